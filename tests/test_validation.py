"""What parse_signup takes, and what it refuses and why."""

import json
import random

import pytest
from email_validator import EmailNotValidError, validate_email

from signup.validation import InvalidBody, InvalidField, Signup, parse_signup

GOOD = {"email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}


def body(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


def test_fields_are_trimmed_and_unknown_ones_ignored() -> None:
    given = body(email=" Ada@EXAMPLE.com\n", first_name="\tAda ", age=36)
    assert parse_signup(given) == Signup("Ada@example.com", "Ada", "Lovelace")


@pytest.mark.parametrize(
    "name",
    [
        "x" * 100,
        "José",
        "李小龍",
        "O'Brien-Smith; DROP TABLE users",
        "Jean\u00a0Paul",
        "می\u200cخواهم",  # Persian, spelt with a zero-width non-joiner
        "𝒜da",
        "<script>",
    ],
)
def test_names_of_all_sorts(name: str) -> None:
    assert parse_signup(body(first_name=name)).first_name == name
    as_utf8 = json.dumps(GOOD | {"last_name": name}, ensure_ascii=False).encode()
    assert parse_signup(as_utf8).last_name == name


@pytest.mark.parametrize(
    "email",
    [
        "a@example.com",
        "first.last+tag@sub.example.co.uk",
        "ü@exämple.de",
        "x" * 64 + "@example.com",
    ],
)
def test_emails_of_all_sorts(email: str) -> None:
    assert parse_signup(body(email=email)).email == email


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b" ",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b'{"email": }',
        b"{'email': 'a@example.com'}",
        b"\xff\xfe",
        json.dumps(GOOD).encode("utf-16"),
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        body() + b"x",
        body(email=5),
        body(first_name=None),
        body(last_name=["Lovelace"]),
        body(first_name=True),
        body(age=float("nan")),
        b'{"email": "a@example.com", "email": "b@example.com"}',
        b'{"n": ' + b"9" * 10_000 + b"}",
        b"[" * 8_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
)
def test_what_is_not_an_object_of_strings(given: bytes) -> None:
    with pytest.raises(InvalidBody):
        parse_signup(given)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"email": ""}, "email", "email is required"),
        ({"email": " \n"}, "email", "email is required"),
        ({"email": "x" * 243 + "@example.com"}, "email", "email must be at most 254 characters"),
        (
            {"email": "invalid"},
            "email",
            "email is not valid: An email address must have an @-sign.",
        ),
        ({"email": "a\x00@example.com"}, "email", "email must not contain control"),
        ({"email": "a@example.com\u202e.x"}, "email", "email must not contain control"),
        ({"email": "a b@example.com"}, "email", "email is not valid"),
        ({"email": "a@localhost"}, "email", "email is not valid"),
        ({"first_name": "  "}, "first_name", "first name is required"),
        ({"first_name": "\u200d"}, "first_name", "first name is required"),
        ({"first_name": "x" * 101}, "first_name", "first name must be at most 100 characters"),
        ({"first_name": "A\x00da"}, "first_name", "first name must not contain control"),
        ({"first_name": "A\x1bda"}, "first_name", "first name must not contain control"),
        ({"last_name": "\ud800"}, "last_name", "last name must not contain control"),
        ({"last_name": "Love\u200blace"}, "last_name", "last name must not contain control"),
        ({"last_name": "Love\u2028lace"}, "last_name", "last name must not contain control"),
        ({"last_name": "\u202eecalevoL"}, "last_name", "last name must not contain control"),
        # The first failing field counts.
        ({"email": "", "first_name": "", "last_name": ""}, "email", "email is required"),
        ({"first_name": "", "last_name": ""}, "first_name", "first name is required"),
    ],
)
def test_the_first_field_that_breaks_a_rule(
    changes: dict[str, str], field: str, message: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_signup(body(**changes))
    assert caught.value.field == field
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("field", GOOD)
def test_a_missing_field(field: str) -> None:
    given = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(InvalidField, match=f"^{field.replace('_', ' ')} is required$") as caught:
        parse_signup(json.dumps(given).encode())
    assert caught.value.field == field


def test_plain_emails_are_judged_as_by_the_library() -> None:
    draw = random.Random(8)  # the same emails in every run

    def text(alphabet: str, most: int) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(1, most)))

    verdicts = set()
    for _ in range(5000):
        local = text("aZ9_+-.", 5) if draw.random() < 0.8 else text("a.'\"@ \\é", 6)
        local *= draw.choice([1, 1, 1, 20])
        ending = draw.choice(["com", "COM", "c", "test", "local", "xn--p1ai", "xn--x", "рф"])
        email = f"{local}@{text('aB1-.', 9) * draw.choice([1, 1, 9])}.{ending}".strip()
        try:
            expected = validate_email(email, check_deliverability=False).normalized
        except EmailNotValidError as error:
            expected = f"email is not valid: {error}"
        try:
            found = parse_signup(body(email=email)).email
        except InvalidField as error:
            found = str(error)
        if len(email) <= 254:  # there is a message of our own for longer ones
            assert found == expected
            verdicts.add("@" in found)
    assert verdicts == {True, False}
