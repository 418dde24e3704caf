"""Hostile and broken requests get the documented response and harm no other client.

Each request is sent as is over its own connection. The client closes only after the responses,
except for requests cut short: gunicorn would wait for the rest. gunicorn itself refuses what is
not HTTP, with an HTML page or by closing the connection.
"""

import io
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import parse_headers
from itertools import chain, count
from typing import Any, NamedTuple

from testbed.database import count_users
from testbed.service import USER, Service

FIELDS = tuple(USER)
LIMIT = 16384  # MAX_BODY_BYTES
numbers = count()

# No response may contain code, the service's SQL or a connection string.
SECRETS = re.compile(r"Traceback|\.py\b|site-packages|psycopg|INSERT INTO|RETURNING|postgres|host=")
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# No log may contain the client's address or data of a request that gunicorn refuses.
PERSONAL = re.compile("127\\.0\\.0\\.1|zebedee|example|Ada|Lovelace", re.IGNORECASE)


class Answer(NamedTuple):
    """A response of the application; `status` is 0 if gunicorn refuses the request.

    Of a 201, `json` is the last name alone.
    """

    status: int
    json: Any = None
    allow: str | None = None

    def counts(self) -> bool:
        """Return whether the metrics count it: the application's responses on /signup."""
        return self.status not in (0, 200, 404) and self.allow in (None, "POST")


REFUSED = Answer(0)
INVALID = Answer(400, {"error": "invalid request body"})
TOO_LARGE = Answer(413, {"error": "request body too large"})
NOT_POST = Answer(405, {"error": "method not allowed"}, "POST")
NOT_GET = Answer(405, {"error": "method not allowed"}, "GET, HEAD, OPTIONS")
NOT_FOUND = Answer(404, {"error": "not found"})
NO_EMAIL = Answer(400, {"error": "email is required", "field": "email"})
WELCOME = Answer(200, {"message": "welcome"})


def refused(field: str, message: str) -> Answer:
    return Answer(400, {"error": message, "field": field})


def http(line: bytes, *headers: bytes, body: bytes = b"", host: bytes = b"Host: x") -> bytes:
    return b"\r\n".join([line, *filter(None, [host]), *headers, b"", body])


def post(body: bytes, *headers: bytes, target: bytes = b"/signup", **options: Any) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return http(b"POST %s HTTP/1.1" % target, length, *headers, body=body, **options)


def length(value: bytes, body: bytes = b"{}", *headers: bytes) -> bytes:
    """Return a signup with `value` as its Content-Length."""
    return http(b"POST /signup HTTP/1.1", b"Content-Length: " + value, *headers, body=body)


def chunks(body: bytes, *headers: bytes) -> bytes:
    """Return a chunked signup; `body` includes the chunk sizes."""
    return http(b"POST /signup HTTP/1.1", b"Transfer-Encoding: chunked", *headers, body=body)


def user_json(**changes: Any) -> bytes:
    return json.dumps(USER | changes, ensure_ascii=False).encode()


def new_user_json(**changes: Any) -> bytes:
    """Return a user with an email that no other request uses."""
    return user_json(email=f"fine.{next(numbers)}@example.com", **changes)


def name(text: bytes) -> bytes:
    """Return a user with these bytes as the first name."""
    return user_json(first_name="?").replace(b'"?"', b'"' + text + b'"')


def extra(text: bytes) -> bytes:
    """Return a user with an unknown field of this value."""
    return user_json()[:-1] + b', "extra": ' + text + b"}"


def get(*headers: bytes, target: bytes = b"/signup", **options: Any) -> bytes:
    return http(b"GET %s HTTP/1.1" % target, *headers, **options)


GOOD = user_json()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)
HIDDEN = get(target=b"/")

WRONG_TYPES: tuple[Any, ...] = (None, True, 1, 1.5, [], ["x"], {}, {"$ne": ""})
# Not a JSON object of strings, or not UTF-8.
BAD_BODIES = (
    *map(GOOD.decode().encode, ("utf-16", "utf-16-le", "utf-32", "cp037")),
    *(b"+AHs-" + GOOD[1:], b"\xef\xbb\xbf" + GOOD, b"\x1f\x8b\x08" + GOOD),  # UTF-7, BOM, gzip
    # Latin-1, an overlong form, a surrogate, a partial character, beyond Unicode; then controls.
    *map(name, (b"Zo\xeb", b"\xc0\xaf", b"\xed\xa0\x80", b"\xe2\x82", b"\xf4\x90\x80\x80")),
    *map(name, (b"a\nb", b"a\tb", b"a\0b", rb"\x41", rb"\u12")),
    *(b"", b" \r\n\t ", b"null", b"true", b"1", b'"email"', b"[]", b"[" + GOOD + b"]", GOOD + GOOD),
    *(GOOD + b"x", GOOD + b"\0", GOOD[:-1], GOOD[:-1] + b",}", GOOD.replace(b'"', b"'")),
    *(extra(b"01"), extra(b"True"), b"email=ada@example.com&first_name=Ada&last_name=Lovelace"),
    *(b'{"a": 1, ' * 1500, b"[" * LIMIT, b'{"a":' * (LIMIT // 5)),
    # RFC 8259, section 9, leaves the limit to the parser, and int() takes quadratic time.
    extra(b"9" * 5000),
    *(user_json(**{field: value}) for field in FIELDS for value in WRONG_TYPES),
)

# Texts that every field refuses, as JSON spells them.
BLANK = (b"", b" ", rb"\u00a0", rb"\u2003", rb"\r\n", rb"\u200d \u200c", rb"\u3164", rb"\u2800")
FORBIDDEN = (
    *(rb"\u0000", rb"\u001b[2J", rb"\t", rb"\r\nSet-Cookie: a=b", rb"\u007f", rb"\u0085"),
    *(rb"\ud83d", rb"\ude00", rb"\ude00\ud83d", rb"\u200b", rb"\u2060", rb"\ufeff", rb"\u00ad"),
    *(rb"\u200f", rb"\u202e", rb"\u2067", rb"\u2028", rb"\u2029", rb"\udb40\udc41"),
)

# Body sizes and framing that the application refuses.
BODIES = {
    "over the limit": (post(b" " * (LIMIT + 1)), TOO_LARGE),
    "declared far over the limit": (length(b"99999999999999999999", GOOD), TOO_LARGE),
    "over the limit in chunks": (chunks(b"4001\r\n" + b" " * 0x4001 + b"\r\n0\r\n\r\n"), TOO_LARGE),
    "1 MB in one chunk": (chunks(b"f4240\r\n%b\r\n0\r\n\r\n" % (b" " * 1_000_000)), TOO_LARGE),
    "no length": (http(b"POST /signup HTTP/1.1"), INVALID),
    "no length in HTTP/1.0": (http(b"POST /signup HTTP/1.0"), INVALID),
    "length too small": (length(b"%d" % (len(GOOD) - 1), GOOD), INVALID),
    "an empty body with Expect": (post(b"", b"Expect: 100-continue"), INVALID),
    "a Host of 8,000 characters": (post(GOOD, host=b"Host: " + b"x" * 8000), INVALID),
}
END = b"\r\n{}\r\n0\r\n\r\n"
BAD_CHUNKS = (  # none, and one of each kind that gunicorn refuses while the body is read
    *(b"0\r\n\r\n", b"zz" + END, b"zz\r\n\r\n" + HIDDEN, b"1" + END, b"2;a=\x01" + END),
    # Trailers: one that would change the request, a malformed one, and too many.
    *(CHUNKED[:-2] + b"Content-Length: 1\r\n\r\n", CHUNKED[:-2] + b"zebedee\r\n\r\n"),
    CHUNKED[:-2] + b"A: b\r\n" * 200 + b"\r\n",
)
PARTS = (b"", b"2", b"5\r\n{}", CHUNKED[:-7], CHUNKED[:-2])
CUT_SHORT = {
    "a body, before its first byte": (length(b"100", b""), INVALID),
    "a body": (length(b"100", b"{"), INVALID),
    "a body that is valid JSON": (length(b"%d" % (len(GOOD) + 1), GOOD), INVALID),
    **{f"chunks {body!r}": (chunks(body), INVALID) for body in PARTS},
    "a head": (b"GET /signup HTTP/1.1\r\nHost: zebedee\r\nX: x", REFUSED),
    "a long head": (b"GET /signup HTTP/1.1\r\nX: zebedee" + b"x" * 100_000, REFUSED),
}
UNREAD = http(b"GET / HTTP/1.1", b"Transfer-Encoding: chunked", body=b"zz\r\n\r\n" + HIDDEN)
OTHER = length(b"2", b"{}" + HIDDEN).replace(b"POST", b"GET", 1)
LARGE = chunks(b"4001\r\n" + b" " * 0x4001 + b"\r\n" + HIDDEN)
SMUGGLED = {  # a second request is served only if the end of the first is certain
    "behind a short body": (length(b"2", b"{}" + HIDDEN), NO_EMAIL, WELCOME),
    "behind the chunks": (chunks(b"2\r\n{}\r\n0\r\n\r\n" + HIDDEN), NO_EMAIL, WELCOME),
    "behind another method's body": (OTHER, NOT_POST, WELCOME),
    "in too large a body": (length(b"20000", HIDDEN * 1000), TOO_LARGE, REFUSED),
    "in too large chunks": (LARGE, TOO_LARGE, REFUSED),
    "behind CONNECT": (http(b"CONNECT /signup HTTP/1.1") + HIDDEN, NOT_POST),
    "in chunks that are not read": (UNREAD, WELCOME, REFUSED),
    "in a header": (get(b"X: x\r\n\r\n" + HIDDEN), NOT_POST, WELCOME, REFUSED),
}
# One request of each kind that gunicorn refuses, and one for each setting that would permit it.
LINES = (
    *(b"zebedee", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/2.0"),
    *(b"post /zebedee HTTP/1.1", b"GET /zebedee?" + b"x" * 5000 + b" HTTP/1.1"),
)
NOT_HTTP = (
    *(length(value, b"{}" + HIDDEN) for value in (b"-1", b"2, 2", b"9" * 5000)),
    length(b"2", b"{}" + HIDDEN, b"Content-Length: %d" % (2 + len(HIDDEN))),
    length(b"5", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked"),
    chunks(CHUNKED).replace(b"Encoding", b"Encoding "),
    *(chunks(CHUNKED).replace(b"chunked", coding) for coding in (b"zebedee", b"\r\n chunked")),
    *(get(b"X: " + b"x" * 10_000), get(*[b"X: x"] * 100), get(b"X: zebedee\0"), get(b"zebedee")),
    *(get(b"\xc3\xa9: zebedee"), get(b"Host: zebedee"), get(b"Expect: zebedee")),
    get(b"X-Forwarded-Proto: https", b"X-Forwarded-Ssl: zebedee"),
    *(line + b"\r\nHost: x\r\n\r\n" + HIDDEN for line in LINES),
)
NAMED = ("GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "PO-ST")
METHODS = {
    **{name: (http(name.encode() + b" /signup HTTP/1.1"), NOT_POST) for name in NAMED},
    "PUT with a user": (post(GOOD).replace(b"POST", b"PUT", 1), NOT_POST),
    "override header": (get(b"X-HTTP-Method-Override: POST"), NOT_POST),
    "POST /": (post(GOOD, target=b"/"), NOT_GET),
}
OTHER_PATHS = (  # only the exact path /signup matches
    *("/nothing", "/signup/", "//signup", "/SIGNUP", "/static/x"),
    *("/signup%00", "/signup%2f", "/%2fsignup", "/signup%20", "/signup%0d%0aX:%20y", "/./signup"),
    *("/x/../signup", "/%2e%2e/signup", "/signup;x=y", "/signup%3Fa=b", "/\\signup", "/sign%FFup"),
    *("/%252fsignup", "/%2e%2e/%2e%2e/etc/passwd", "/metrics/", "///signup", "http://x//signup"),
    *("http://x", "//x/signup", "http://x?/signup", "signup?://", "file:///etc/passwd"),
)
PATHS = {
    **{path: (post(GOOD, target=path.encode()), NOT_FOUND) for path in OTHER_PATHS},
    "asterisk": (http(b"OPTIONS * HTTP/1.1"), NOT_FOUND),
    "CONNECT": (http(b"CONNECT x:80 HTTP/1.1"), NOT_FOUND),
    "GET": (get(target=b"/signup/"), NOT_FOUND),
    "CONNECT signup": (http(b"CONNECT signup HTTP/1.1"), NOT_FOUND),
}


def field_cases(field: str) -> dict[str, Any]:
    """Return the cases that apply to every field."""
    label = field.replace("_", " ")
    most = 254 if field == "email" else 100

    def case(text: bytes, message: str) -> tuple[bytes, Answer]:
        body = user_json(**{field: "?"}).replace(b'"?"', b'"' + text + b'"')
        return post(body), refused(field, f"{label} {message}")

    forbidden = "must not contain control or invisible characters"
    missing = json.dumps({key: value for key, value in USER.items() if key != field}).encode()
    return {
        **{f"{field}: {text!r}": case(text, "is required") for text in BLANK},
        **{f"{field}: a{text!r}": case(b"a@b.c" + text + b"d", forbidden) for text in FORBIDDEN},
        f"{field}: too long": case(b"a" * (most + 1), f"must be at most {most} characters"),
        f"{field}: missing": (post(missing), refused(field, f"{label} is required")),
    }


# Unusual, but each of these is a valid signup.
NAMES = (
    *("Robert'); DROP TABLE users; --", "' OR '1'='1", '"; SELECT pg_sleep(9); --', "%s %(id)s %d"),
    *("{0} {{7*7}} ${7*7}", "<script>alert(1)</script>", "../../etc/passwd", "null", "NaN", "\\"),
    *("$(reboot) `reboot`", "=1+1", "Set-Cookie: a=b", "X Æ A-12", "𝒜" * 100, "李小龍"),
    *("Jean\u00a0Paul", "می\u200cخواهم", "e\u034f\u0301", "\u0301"),  # a joiner, combining marks
    # One family of emoji with joiners, and selectors of a colour and of a variant glyph.
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "❤\ufe0f", "葛\U000e0100"),
)
EXTRAS = (
    *(b"1e999", b"-0", b"null", b'"\\ud800"', b"[" * 200 + b"]" * 200, b'{"email": 1}'),
    *(b'"\\u0000"', b"9" * 4000, b'1, "id": 1, "__proto__": {}, "created_at": 1'),
)
SAME_PATH = (
    *(b"/%73ignup", b"/signu%70", b"/signup?", b"/signup?a=b&a=c%00", b"/signup#fragment"),
    *(b"http://x/signup", b"HTTP://evil.example/signup", b"ftp://x/signup"),
)
HEADERS = (  # without effect on the response
    *(b"SCRIPT_NAME: /x", b"SCRIPT-NAME: /signup", b"PATH_INFO: /", b"PATH-INFO: /"),
    *(b"CONTENT_LENGTH: 1", b"TRANSFER_ENCODING: chunked", b"Expect: 100-Continue"),
    *(b"X-Forwarded-For: \xe9, ' OR 1=1", b"X-Forwarded-Host: evil.example"),
    *(b"X-Forwarded-Proto: gopher", b"X-Forwarded-Prefix: /signup", b"X-Original-URL: /metrics"),
    *(b"X-HTTP-Method-Override: GET", b"Content-Type: application/json; charset=utf-16"),
    b"Content-Type: application/x-www-form-urlencoded",  # what plain `curl -d` sends
    *(b"Content-Type: multipart/form-data", b"Content-Encoding: gzip", b"Cookie: session=\xe9; a"),
    *(b"Upgrade: websocket\r\nConnection: Upgrade", b"Accept: x"),
    *(b"X-Request-ID: a b", b"X-Request-ID: \xe9", b"X-Request-ID: " + b"a" * 129),
    *(b'X-Request-ID: "}{"level":"x', b"X-Request-ID:", b"X-Request-ID: <script>"),
)
HOSTS = (
    *(b"", b"Host:", b"Host: a b", b"Host: \xe9", b"Host: evil.example", b"Host: x:99999"),
    *(b"Host: x:y", b"Host: [::1", b"Host: x/signup?", b"Host: a@b"),
)
FINE = {
    **{
        f"x: {text[:40]!r}": post(new_user_json()[:-1] + b', "x": ' + text + b"}")
        for text in EXTRAS
    },
    **{f"path: {path!r}": post(new_user_json(), target=path) for path in SAME_PATH},
    **{f"header: {header[:80]!r}": post(new_user_json(), header) for header in HEADERS},
    **{f"host: {host[:80]!r}": post(new_user_json(), host=host) for host in HOSTS},
    "surrounding white space": post(b"\r\n\t " + new_user_json() + b" \n"),
    "the largest body": post(new_user_json().ljust(LIMIT)),
    "the largest body in chunks": chunks(
        b"2000\r\n%b\r\n2000\r\n%b\r\n0\r\n\r\n" % (new_user_json().ljust(8192), b" " * 8192)
    ),
    "escapes": post(new_user_json(first_name="?").replace(b"?", rb"\u0041\ud83d\ude00\/")),
    "HTTP/1.0": post(new_user_json()).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a leading empty line": b"\r\n" + post(new_user_json()),
    "leading zeros in the length": post(new_user_json()).replace(b"Length: ", b"Length: 000"),
    "99 headers": post(new_user_json(), *[b"X: x"] * 97),
    "chunks": chunks(b"C8;a=b\r\n%s\r\n0\r\nX: x\r\n\r\n" % new_user_json().ljust(200)),
    "chunks of one byte": chunks(
        b"".join(b"001\r\n%c\r\n" % byte for byte in new_user_json()) + b"000\r\n\r\n"
    ),
}


TABLES: dict[str, dict[str, Any]] = {
    **{"framing": BODIES, "cut short": CUT_SHORT, "smuggled": SMUGGLED},
    **{"method": METHODS, "path": PATHS},
}
NO_AT = "email is not valid: An email address must have an @-sign."
TWO_BAD_FIELDS = post(user_json(first_name="", last_name="\0"))
CASES = {
    **{f"body: {text[:40]!r} {n}": (post(text), INVALID) for n, text in enumerate(BAD_BODIES)},
    **{f"chunks: {text[:40]!r} {n}": (chunks(text), INVALID) for n, text in enumerate(BAD_CHUNKS)},
    **{f"not HTTP: {text[:60]!r} {n}": (text, REFUSED) for n, text in enumerate(NOT_HTTP)},
    **{key: case for field in FIELDS for key, case in field_cases(field).items()},
    "no email": (post(user_json(email="invalid")), refused("email", NO_AT)),
    "the first bad field": (TWO_BAD_FIELDS, refused("first_name", "first name is required")),
    **{f"{title}: {key}": case for title, table in TABLES.items() for key, case in table.items()},
    **{f"fine: {key}": (text, Answer(201, USER["last_name"])) for key, text in FINE.items()},
    **{f"name: {text}": (post(new_user_json(last_name=text)), Answer(201, text)) for text in NAMES},
}


def talk(service: Service, key: str) -> list[Answer]:
    """Send the request of `key`, and return exactly the expected number of responses."""
    request, *expected = CASES[key]
    with service.connect() as client, client.makefile("rb") as stream:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was sent entirely
            client.sendall(request)
        if key.startswith("cut short"):
            client.shutdown(socket.SHUT_WR)
        answers = [receive(stream, head=request.startswith(b"HEAD ")) for _ in expected]
        with suppress(OSError):
            client.shutdown(socket.SHUT_WR)
            assert stream.read() == b""
    return answers


def receive(stream: io.BufferedReader, head: bool) -> Answer:
    """Read the next response, and check what every response must satisfy."""
    try:
        line = stream.readline()
    except ConnectionResetError:
        return REFUSED
    if not line:
        return REFUSED
    assert re.fullmatch(rb"HTTP/1\.[01] \d{3} [ -~]+\r\n", line), line
    headers = parse_headers(stream)
    status = int(line.split()[1])
    if status == 100:
        return receive(stream, head)
    size = int(headers["Content-Length"])
    body = b"" if head else stream.read(size)
    assert head or len(body) == size
    text = f"{headers}{body.decode(errors='replace')}"
    assert not SECRETS.search(text), text
    assert all(value.isascii() and value.isprintable() for value in headers.values()), text
    if headers["Content-Type"] != "application/json":
        assert 400 <= status < 500 or status in (501, 505), text
        assert headers["Connection"] == "close"
        return REFUSED
    assert SANE_ID.fullmatch(headers["X-Request-ID"])
    if status == 201:
        return Answer(201, json.loads(body)["user"]["last_name"])
    allow = headers["Allow"] and ", ".join(sorted(headers["Allow"].split(", ")))
    return Answer(status, NOT_POST.json if head else json.loads(body), allow)


def test_each_request_gets_the_documented_responses_and_harms_no_other(
    service: Service, database_url: str
) -> None:
    boots, before = service.boots(), len(service.log())
    with ThreadPoolExecutor(16) as executor:
        answers = dict(zip(CASES, executor.map(partial(talk, service), CASES), strict=True))
    wrong = {key: each for key, each in answers.items() if each != list(CASES[key][1:])}
    assert not wrong
    service.answers.update(each.status for each in chain(*answers.values()) if each.counts())
    service.check_equalities(count_users(database_url))
    assert service.boots() == boots
    log = service.log()[before:]
    assert '"Invalid request"' in log
    assert "traceback" not in log.lower()
    assert not PERSONAL.findall(log)
