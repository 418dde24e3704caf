"""What a client may send to POST /signup (design: the HTTP contract's 400 rows)."""

import functools
import json
import re
import unicodedata
from typing import NamedTuple

from email_validator import EmailNotValidError, validate_email

MAX_LENGTHS = {"email": 254, "first_name": 100, "last_name": 100}  # characters; RFC 5321, 4.5.3.1.3
# Letters, digits and the usual punctuation, with which an email is as valid as its domain.
PLAIN_LOCAL_PART = re.compile(r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*")
# Control characters, lone surrogates, separators of lines and paragraphs, and format characters,
# with which a name is shown as another one (U+202E); Persian and Indic names need two of them.
FORBIDDEN_CATEGORIES = {"Cc", "Cs", "Cf", "Zl", "Zp"}
JOINERS = "\u200c\u200d"
# White space, Unicode's Default_Ignorable_Code_Point (version 17, UAX #44), and the characters
# beside it whose glyph is blank by its name: in Braille, music, Khitan and hieroglyphs.
INVISIBLE = re.compile(
    "[\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "\u2800\U0001d159\U00016fe4\U00013441\U00013442]*"
)


class InvalidBody(Exception):
    """The body is not a JSON object with string fields."""


class InvalidField(Exception):
    """A field breaks a rule: its name, and for the client what is wrong."""


class Signup(NamedTuple):
    """A valid signup, trimmed; the email's domain in lower case, its local part as typed."""

    email: str
    first_name: str
    last_name: str


def parse_signup(body: bytes) -> Signup:
    """The signup in a body of JSON in UTF-8. Raises InvalidBody, or the first InvalidField."""
    try:
        fields = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise InvalidBody from error
    if not isinstance(fields, dict):
        raise InvalidBody
    texts = {name: fields.get(name, "") for name in Signup._fields}
    if not all(isinstance(text, str) for text in texts.values()):
        raise InvalidBody
    return Signup(*(_field(name, text.strip()) for name, text in texts.items()))


def fold_email(email: str) -> str:
    """The same for every letter case (Unicode, D145). PostgreSQL's lower() depends on a locale."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", email).casefold())


def _field(field: str, text: str) -> str:
    label, most = field.replace("_", " "), MAX_LENGTHS[field]
    if INVISIBLE.fullmatch(text):
        raise InvalidField(field, f"{label} is required")
    if len(text) > most:
        raise InvalidField(field, f"{label} must be at most {most} characters")
    if not text.isprintable():
        categories = {unicodedata.category(char) for char in text if char not in JOINERS}
        if categories & FORBIDDEN_CATEGORIES:
            raise InvalidField(field, f"{label} must not contain control or invisible characters")
    return _email(text) if field == "email" else text


def _email(text: str) -> str:
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
