"""The walk through the code in docs/walk.md names functions that exist, in the files that it says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| \d+\w? \| (?P<names>[^|]+) \| `(?P<file>[^`]+)` \|", flags=re.MULTILINE)


def names_in(path: Path) -> set[str]:
    """Return the functions and classes of a module, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)))
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_every_name_of_the_walk_is_where_it_says() -> None:
    rows = list(ROW.finditer((ROOT / "docs/walk.md").read_text()))
    assert len(rows) >= 25
    wrong = [
        f"{row['file']}: {name}"
        for row in rows
        for name in re.findall(r"`([^`]+)`", row["names"])
        if name not in names_in(ROOT / "src/backtalk" / row["file"])
    ]
    assert not wrong, wrong
