"""Imports between the rooms of the project go one way."""

import ast

from testbed import ROOT

# The other rooms that each room may import.
ALLOWED: dict[str, set[str]] = {
    "signup": set(),
    "app.py": {"signup"},
    "gunicorn.conf.py": {"signup"},
    "testbed": {"signup"},
    "drills": {"signup", "testbed"},
    "benchmarks": {"signup", "testbed"},
    "tests": {"signup", "testbed", "drills"},
}


def imported(room: str) -> set[str]:
    """Return the other rooms that `room`, a folder or a file, imports."""
    path = ROOT / room
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module))
    return {name.partition(".")[0] for name in found} & ALLOWED.keys() - {room}


def test_rooms_import_only_allowed_rooms() -> None:
    directions = {room: imported(room) for room in ALLOWED}
    for room, others in directions.items():
        assert others <= ALLOWED[room], room
    assert directions["app.py"] == directions["testbed"] == {"signup"}  # imports are found
