"""What a client may send to POST /signup (design: the HTTP contract's 400 rows)."""

import functools
import json
import re
import unicodedata
from typing import Any, NamedTuple, NoReturn

from email_validator import EmailNotValidError, validate_email

MAX_EMAIL_LENGTH = 254  # characters; RFC 5321, section 4.5.3.1.3, less the angle brackets
MAX_NAME_LENGTH = 100  # characters

# Letters, digits and the usual punctuation, with which an email is as valid as its domain.
PLAIN_LOCAL_PART = re.compile(r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*")

# Control characters, lone surrogates, line and paragraph separators, and invisible format
# characters such as U+202E, which lets a name be shown as another one. The two joiners are
# format characters as well, but Persian and Indic names are spelt with them.
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cs", "Cf", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"


class InvalidBody(Exception):
    """The body is not a JSON object with string fields."""


class InvalidField(Exception):
    """A field breaks a rule: its name, and for the client what is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Signup(NamedTuple):
    """A valid signup, trimmed; the email's domain in lower case, its local part as typed."""

    email: str
    first_name: str
    last_name: str


def parse_signup(body: bytes) -> Signup:
    """The signup in a request's body, which is JSON in UTF-8 (RFC 8259).

    Unknown fields are ignored; a field that is null counts as one of a wrong type.
    Raises InvalidBody, or InvalidField for the first bad one of email, first_name, last_name.
    """
    try:
        fields = _decoder.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise InvalidBody from error
    if not isinstance(fields, dict):
        raise InvalidBody
    texts = [fields.get(name, "") for name in Signup._fields]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidBody
    email, first_name, last_name = texts
    return Signup(
        _email(email),
        _text("first_name", first_name, MAX_NAME_LENGTH),
        _text("last_name", last_name, MAX_NAME_LENGTH),
    )


def _email(text: str) -> str:
    text = _text("email", text, MAX_EMAIL_LENGTH)
    local, _, domain = text.rpartition("@")
    try:
        if len(local) <= 64 and text.isascii() and PLAIN_LOCAL_PART.fullmatch(local):
            return f"{local}@{_domain(domain)}"
        return validate_email(text, check_deliverability=False).normalized
    except EmailNotValidError as error:
        raise InvalidField("email", f"email is not valid: {error}") from error


@functools.lru_cache(1024)  # most people's emails have one of a few domains
def _domain(text: str) -> str:
    return validate_email(f"x@{text}", check_deliverability=False).domain


def _text(field: str, text: str, max_length: int) -> str:
    text = text.strip()
    label = field.replace("_", " ")
    if all(character.isspace() or character in _JOINERS for character in text):
        raise InvalidField(field, f"{label} is required")
    if len(text) > max_length:
        raise InvalidField(field, f"{label} must be at most {max_length} characters")
    if not text.isprintable() and any(map(_is_forbidden, text)):
        raise InvalidField(field, f"{label} must not contain control or invisible characters")
    return text


def _is_forbidden(character: str) -> bool:
    return unicodedata.category(character) in _FORBIDDEN_CATEGORIES and character not in _JOINERS


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers differ in which of two equal keys they take, so such a body has no one meaning.
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("duplicate key")
    return fields


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")  # NaN and Infinity, which Python's parser takes


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_json)
