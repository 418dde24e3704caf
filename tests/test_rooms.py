"""The rooms of the project import one way."""

import ast

from testbed import ROOT

# What each room may import of the others.
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
    """The other rooms that a room, a folder or a file, imports."""
    path = ROOT / room
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module))
    return {name.partition(".")[0] for name in found} & ALLOWED.keys() - {room}


def test_rooms_import_one_way() -> None:
    directions = {room: imported(room) for room in ALLOWED}
    for room, others in directions.items():
        print(f"{room:16} -> {', '.join(sorted(others)) or '(nothing)'}")
        assert others <= ALLOWED[room]
    assert directions["app.py"] == directions["testbed"] == {"signup"}  # so it does find some
