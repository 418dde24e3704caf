"""What parse_signup accepts and refuses; tests/test_hostile.py has unusual names, and messages."""

import json
import random
import sys
import unicodedata

import pytest
import regex  # type: ignore[import-untyped]
from email_validator import EmailNotValidError, validate_email

from signup.validation import InvalidField, Signup, fold_email, parse_signup
from testbed.service import USER

UNICODE = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
BLANK = "\u2800\U0001d159\U00016fe4\U00013441\U00013442"  # blank glyphs, by their Unicode names


def body(**changes: object) -> bytes:
    return json.dumps(USER | changes).encode()


def test_fields_are_trimmed_and_unknown_fields_are_ignored() -> None:
    given = body(email=" Ada@EXAMPLE.com\n", first_name="\tAda ", age=36)
    assert parse_signup(given) == Signup("Ada@example.com", "Ada", "Lovelace")


def test_invisible_name_is_refused() -> None:
    ignorable = regex.compile(r"\p{Default_Ignorable_Code_Point}")
    unseen = [c for c in UNICODE if c.isspace() or c in BLANK or ignorable.match(c)]
    assert len(unseen) > 4000
    verdicts: dict[str, set[str]] = {}
    for character in unseen:
        for name in (character, character * 3, f"{character} \u200d{character}"):
            with pytest.raises(InvalidField) as caught:
                parse_signup(body(first_name=name))
            verdicts.setdefault(caught.value.args[1], set()).add(character)
    required = verdicts.pop("first name is required")
    forbidden = verdicts.pop("first name must not contain control or invisible characters", set())
    assert not verdicts
    assert required | forbidden == set(unseen)
    assert {unicodedata.category(character) for character in forbidden} <= {"Cc", "Cf", "Zl", "Zp"}


def test_email_verdicts_equal_those_of_email_validator() -> None:
    draw = random.Random(8)  # the same emails in every run

    def text(alphabet: str, most: int) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(1, most)))

    emails = ["Ada <ada@example.com>", '"a b"@example.com', "ü@[127.0.0.1]", "ada@[127.0.0.1]"]
    for _ in range(5000):
        local = text("aZ9_+-.", 5) if draw.random() < 0.8 else text("a.'\"@ \\é", 6)
        local *= draw.choice([1, 1, 1, 20])
        ending = draw.choice(["com", "COM", "c", "test", "local", "xn--p1ai", "xn--x", "рф"])
        emails.append(f"{local}@{text('aB1-.', 9) * draw.choice([1, 1, 9])}.{ending}".strip())
    verdicts = set()
    for email in emails:
        try:
            expected = validate_email(email, check_deliverability=False).normalized
        except EmailNotValidError as error:
            expected = f"email is not valid: {error}"
        try:
            found = parse_signup(body(email=email)).email
        except InvalidField as error:
            found = error.args[1]
        if len(email) <= 254:  # the service has its own message for longer emails
            assert found == expected
            verdicts.add("@" in found)
    assert verdicts == {True, False}


def test_every_letter_case_of_a_text_folds_the_same_and_nothing_else_does() -> None:
    # The dotless i of Turkish and Azerbaijani: its capital is the ordinary I.
    exceptions = {"ı"}
    changes = (str.upper, str.lower, str.title, str.swapcase)

    def changed(text: str) -> bool:
        spellings = {text, *(change(text) for change in changes)} - {text}
        fold = fold_email(f"{text}@example.com") if spellings else ""
        return any(fold_email(f"{spelling}@example.com") != fold for spelling in spellings)

    assert {character for character in UNICODE if changed(character)} == exceptions
    letters = [character for character in UNICODE if character.isalpha()]
    cased = [character for character in letters if character.swapcase() != character]
    draw = random.Random(8)  # the same texts in every run
    for turn in range(5_000):
        text = "".join(draw.choices(cased if turn % 2 else letters, k=draw.randint(2, 6)))
        assert changed(text) == bool(exceptions & set(text)), ascii(text)
    for one, other in (("jose", "josé"), ("ivan", "İvan"), ("Ａda", "Ada"), ("a.da", "ada")):
        assert fold_email(f"{one}@example.com") != fold_email(f"{other}@example.com")
