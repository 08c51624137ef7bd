"""The house rules, held by reading the source: who may import whom, who may not load torch, how long things get."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
PACKAGE = SRC / "backtalk"

# A module imports only from lines above its own; the parts on one line do not import each other.
# A part is a module directly under the package, or a folder with all that is in it. "" is backtalk/__init__.py.
LINES: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"files", "settings", "spans", "trajectory"}),
    frozenset({"", "messages", "parquet"}),
    frozenset({"objective", "language", "sandboxes"}),
    frozenset({"tasks"}),
    frozenset({"envs"}),
    frozenset({"rollout"}),
    frozenset({"engines", "exchange"}),
    frozenset({"hosts"}),
    frozenset({"run"}),
    frozenset({"evidence", "capture", "viewer"}),
    frozenset({"cli"}),
)
WORLD_TOWER = (
    *("files", "parquet", "settings", "messages", "sandboxes", "tasks", "envs", "language", "rollout", "exchange"),
    *("run.log", "viewer", "capture"),
)
MATHS_TOWER = ("objective",)
NOT_MATHS = ("asyncio", "logging", "pathlib", "os", "io", "shutil", "tempfile", "subprocess", "pyarrow", "json")
HEAVY = ("torch", "transformers", "pydantic", "numpy", "pyarrow", "matplotlib", "rich", "typer")

MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400
SHORTER = {"objective/loss.py": 200, "rollout/rollout.py": 200}

MODULES = tuple(sorted(PACKAGE.rglob("*.py")))


def module_name(path: Path) -> str:
    """backtalk/envs/base.py -> backtalk.envs.base; a package is named by its folder."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = frozenset(module_name(path) for path in MODULES)


def part_of(module: str) -> str:
    """Return the part that a module is of: backtalk.tasks.triage.machine -> tasks."""
    return [*module.split("."), ""][1]


def line_of(part: str) -> int:
    for number, line in enumerate(LINES):
        if part in line:
            return number
    raise AssertionError(f"{part!r} has no place in the order of imports; give it one in {Path(__file__).name}")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it (functions and TYPE_CHECKING too), with the line number."""
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in NAMES else base), node.lineno


def in_parts(parts: tuple[str, ...]) -> list[Path]:
    """Return the modules of some parts; a part may be a folder inside a folder, written with a dot."""
    within = tuple(f"backtalk.{part}." for part in parts)
    return [path for path in MODULES if f"{module_name(path)}.".startswith(within)]


def identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_a_module_imports_only_from_lines_above_its_own(path: Path) -> None:
    part = part_of(module_name(path))
    wrong = [
        f"{path}:{number}: {part or 'backtalk'} imports {target}"
        for target, number in imports(path)
        if target.split(".")[0] == "backtalk" and part_of(target) != part and line_of(part_of(target)) >= line_of(part)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): {t for t, _ in imports(path) if t in NAMES} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "a circle of imports: " + " -> ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for target in sorted(graph[module] - {module}):
            visit(target, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_no_two_siblings_import_each_other() -> None:
    """Compare folders, and modules beside them, at the level where the importer's path and the target's part."""
    pairs = set()
    for path in MODULES:
        for target in {target for target, _ in imports(path) if target in NAMES}:
            ours, theirs = module_name(path).split("."), target.split(".")
            level = sum(1 for _ in takewhile(lambda names: names[0] == names[1], zip(ours, theirs, strict=False)))
            if level < min(len(ours), len(theirs)):
                pairs.add((".".join(ours[: level + 1]), ".".join(theirs[: level + 1])))
    assert not [pair for pair in sorted(pairs) if pair[::-1] in pairs]


@pytest.mark.parametrize("path", in_parts(WORLD_TOWER), ids=identify)
def test_the_world_tower_never_imports_torch(path: Path) -> None:
    wrong = [f"{path}:{number}" for target, number in imports(path) if target.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", in_parts(MATHS_TOWER), ids=identify)
def test_the_maths_tower_knows_tensors_only(path: Path) -> None:
    wrong = [f"{path}:{number}: {target}" for target, number in imports(path) if target.split(".")[0] in NOT_MATHS]
    assert not wrong, "\n".join(wrong)


def test_a_run_names_no_engine() -> None:
    wrong = [f"{path}:{n}" for path in in_parts(("run", "evidence")) for t, n in imports(path) if "engines.torch" in t]
    assert [line for line in wrong if "run/config.py" not in line] == []  # whose default are the settings of one


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_modules_and_functions_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    most = SHORTER.get(identify(path), MAX_MODULE_LINES)
    assert lines <= most, f"{path} has {lines} lines, at most {most}"
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {length} lines"


NO_VERB = re.compile(
    r"(what|who|whose|whom|where|when|which|why|how|whether|if|as|the|a|an|one|every|each|all|of|for|from|to|in|on|at|"
    r"by|with|without|between|before|after|under|its|their|our|this|these|that|those|some|no|not|nothing|many|several|"
    r"two|three|same|other|more|most|also|only|there|here|it|they|text|tokens|number|numbers)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_docstrings_open_with_a_verb(path: Path) -> None:
    """ruff's D401 knows verbs in the wrong form; this one finds openings that are no verb at all."""
    if path.is_relative_to(PACKAGE / "assets"):  # tasks are written for their agents
        return
    riddles = [
        f"{path}:{node.lineno} {node.name}: {docstring.splitlines()[0]}"
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (docstring := ast.get_docstring(node))
        and NO_VERB.match(docstring)
    ]
    assert not riddles, "\n".join(riddles)


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after running ``code``."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SRC)!r})\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return {name.split(".")[0] for name in run.stdout.split()}


def test_import_backtalk_loads_nothing_heavy() -> None:
    assert not loaded_after("import backtalk") & set(HEAVY)


def test_the_world_tower_runs_without_torch() -> None:
    names = " ".join(f"import {module_name(path)};" for path in in_parts(WORLD_TOWER))
    assert not loaded_after(names) & {"torch", "transformers"}


def test_the_command_line_answers_help_without_torch() -> None:
    assert not loaded_after("import backtalk.cli, backtalk.cli.doctor") & {"torch", "transformers", "matplotlib"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["settings"],
        ["settings", "--schema"],
        ["train", "--preset", "triage", "--set", "steps=many"],
        ["train", "--preset", "shop", "--set", "engine.lerning_rate=1"],
        ["train", "--preset", "triage", "--set", "engine.device=", "--set", "group_size=1"],
        ["train", "--preset", "triage", "--set", "tasks.source={name: openenv:x, options: {seed: 3}}"],
        ["study", "demo", "--set", "steps=many"],
    ],
    ids=" ".join,
)
def test_settings_are_read_and_refused_without_anything_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = "from contextlib import redirect_stdout, suppress; import backtalk.cli, io\n"
    code += f"sys.argv = ['backtalk', *{arguments}]\n"
    code += "with suppress(SystemExit), redirect_stdout(io.StringIO()): backtalk.cli.main()"
    assert not loaded_after(code) & {"torch", "transformers", "numpy", "pyarrow", "matplotlib"}


def test_settings_need_pydantic_alone() -> None:
    loaded = loaded_after("from backtalk.run.config import load_config; load_config('triage')")
    assert not loaded & set(HEAVY) - {"pydantic"}
