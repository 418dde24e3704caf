"""Validation of the body of POST /signup."""

import functools
import json
import re
from contextlib import suppress
from typing import NamedTuple
from unicodedata import category, normalize

from email_validator import EmailNotValidError, validate_email
from werkzeug.exceptions import BadRequest

MAX_LENGTHS = {"email": 254, "first_name": 100, "last_name": 100}  # characters; RFC 5321, 4.5.3.1.3
# An email with such a local part is valid if its domain is, and domains can be cached.
PLAIN_LOCAL_PART = re.compile(r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*")
# Controls, lone surrogates, separators, and formats: U+202E disguises a name. Joiners are spelling.
FORBIDDEN, JOINERS = {"Cc", "Cs", "Cf", "Zl", "Zp"}, "\u200c\u200d"
# White space, Default_Ignorable_Code_Point (Unicode 17), and glyphs that are blank by their name.
INVISIBLE = re.compile(
    "[\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff\u2800\U0001d159\U00016fe4\U00013441\U00013442]*"
)


class InvalidField(Exception):
    """A field breaks a rule. The arguments are its name and the message for the client."""


class Signup(NamedTuple):
    """A valid, trimmed signup. The email's domain is in lower case, its local part as typed."""

    email: str
    first_name: str
    last_name: str


def parse_signup(body: bytes) -> Signup:
    """Parse a UTF-8 JSON body. Raises BadRequest, or InvalidField for the first invalid field."""
    try:
        fields = json.loads(body.decode("utf-8"))
        texts = {name: fields.get(name, "").strip() for name in Signup._fields}
    except (ValueError, AttributeError, RecursionError) as error:  # no JSON, no object, no string
        raise BadRequest from error
    return Signup(*(_field(name, text) for name, text in texts.items()))


def fold_email(email: str) -> str:
    """Fold the local part's letter case (Unicode, D145), in every database's locale alike."""
    local, _, domain = email.rpartition("@")
    with suppress(EmailNotValidError):  # of an older table
        domain = _domain(domain)  # not folded, as straße.de and strasse.de are two
    return f"{normalize('NFC', normalize('NFD', local).casefold())}@{domain}"


def _field(field: str, text: str) -> str:
    label, limit = field.replace("_", " "), MAX_LENGTHS[field]
    if INVISIBLE.fullmatch(text):
        raise InvalidField(field, f"{label} is required")
    if len(text) > limit:
        raise InvalidField(field, f"{label} must be at most {limit} characters")
    if not text.isprintable() and FORBIDDEN & {category(c) for c in text if c not in JOINERS}:
        raise InvalidField(field, f"{label} must not contain control or invisible characters")
    if field != "email":
        return text
    local, _, domain = text.rpartition("@")
    try:
        if text.isascii() and PLAIN_LOCAL_PART.fullmatch(local):
            return f"{local}@{_domain(domain)}"
        return validate_email(text, check_deliverability=False).normalized
    except EmailNotValidError as error:
        raise InvalidField("email", f"email is not valid: {error}") from error


@functools.lru_cache(1024)  # most emails share a few domains
def _domain(text: str) -> str:
    return validate_email(f"x@{text}", check_deliverability=False).domain
