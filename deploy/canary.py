"""Compares a replica's own answers with the contract, in its container, before it gets requests.

No request makes an account: an invalid signup, and one whose email is registered (standard input,
empty if there is none).
"""

import os
import sys
from http.client import HTTPConnection

EXPECTED = [
    ("GET", "/readyz", "", 200),
    ("GET", "/metrics", "", 200),
    ("POST", "/signup", "{}", 400),
]
if known := sys.stdin.read().strip():
    EXPECTED.append(("POST", "/signup", known, 409))
for method, path, body, status in EXPECTED:
    # A signup ends within 11 s.
    replica = HTTPConnection("127.0.0.1", int(os.environ.get("PORT") or 3000), timeout=15)
    replica.request(method, path, body)
    if (answer := replica.getresponse()).status != status:
        sys.exit(f"a new replica answered {method} {path} with {answer.status} instead of {status}")
