"""Every program, command and settings file of the pages is run, or held against the code; the tables say which and why.

Commands run in one folder, with the files that a page supposes there, and with the settings of a tiny training behind
their own. `Qwen/Qwen3-0.6B` is there a link to the embedded model, so that commands that name it need no network. A
block or a command that is in no table fails, and so does a line of a table that nothing on a page matches.
"""

from __future__ import annotations

import ast
import asyncio
import fnmatch
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from backtalk.cli import main
from backtalk.cli.app import app
from backtalk.run.config import config_from_dict, load_config
from backtalk.settings import from_plain

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(p for name in ("docs", "recipes", "examples") for p in (ROOT / name).rglob("*.md")),
]
PROGRAMS = sorted(p for p in (ROOT / "examples").rglob("*") if p.suffix in (".py", ".yaml"))  # what they say on top
COMMANDS: Any = typer.main.get_command(app)

# ---------------------------------------------------------------- what is run, and what is not

TINY = (
    "--set steps=1 --set tasks_per_step=2 --set group_size=2 --set evaluation.tasks=0 --set rollout.max_turns=2 "
    "--set rollout.max_tokens_per_turn=16"
)
RUN = {  # commands that are run, by pattern: what is put behind them, and what is typed at their prompt
    "backtalk doctor": ("", ""),
    "backtalk train --preset triage --out *": (TINY, ""),
    "backtalk train --preset triage --model *": (TINY, ""),
    "backtalk train --preset triage --profile *": (TINY, ""),
    "backtalk train --out runs/mine --resume": ("", ""),
    "backtalk train --preset shop*": (TINY, ""),
    "backtalk train --model * --set tasks.source=guess_world:GuessWorld *": (TINY, ""),
    "backtalk view*": ("--export seen.html", ""),
    "backtalk show runs/*": ("", ""),
    "backtalk report runs/*": ("", ""),
    "backtalk evaluate runs/first": ("--tasks 1 --samples 1 --set rollout.max_turns=1", ""),
    "backtalk evaluate runs/mine --dataset my_tasks": ("--tasks 1 --samples 1 --set rollout.max_turns=1", ""),
    "backtalk score *": ("", ""),
    "backtalk export *": ("", ""),
    "backtalk import *": ("", ""),
    "backtalk account *": ("", ""),
    "backtalk settings*": ("", ""),
    "backtalk dream *": ("", "ls\n"),
    "backtalk capture *--script *": ("", ""),
    "backtalk capture terminal *--human *": ("", "ls\n"),
    "backtalk capture guess_world:GuessWorld *": ("", "/guess 5\n"),
    "backtalk tasks check my_tasks *": ("", ""),
    "python recipes/map/draw.py *": ("", ""),
    "python examples/world_model_loss.py": ("", ""),
}
READ = {  # commands that are only read, with their settings: why they are not run
    "backtalk train --preset triage --set objective.world_model_coeff*": "as the preset alone is",
    "backtalk account examples/*": "as the one of two files is",
    "backtalk train --set tasks.source=my_module:MyWorld *": "as guess_world:GuessWorld is",
    "backtalk train examples/guess.yaml *": "as guess_world:GuessWorld is",
    "backtalk capture openenv:./my_env --human *": "tests/envs/test_openenv.py plays such a folder",
    "backtalk train my_run.yaml *": "as a preset is; settings files of the pages are read",
    "backtalk train examples/bigram.yaml": "tests/engines/test_own_engine.py trains it",
    "backtalk train --openenv ./my_env*": "tests/envs/test_openenv.py starts and plays such a folder",
    "backtalk check": "tests/engines/test_conformance.py runs the suite",
    "backtalk * --format trackio *": "needs Trackio; tests/exchange writes its traces",
    "backtalk * --endpoint *": "asks a server; tests/capture has one",
    "backtalk score * --step 40": "needs a run of 41 steps; a step is scored below",
    "backtalk dream * --step *": "needs a run of 21 steps; tests/cli/test_dream.py has a rollout on record",
    "backtalk serve *": "serves until it is interrupted; tests/run/test_serve.py",
    "backtalk train *engine.kind=tinker*": "asks a service; tests/engines/test_tinker_engine.py plays it",
    "backtalk train *engine.kind=foundry*": "asks a service; tests/engines/test_foundry.py plays it",
    "backtalk train *engine.kind=my_module:*": "an engine in outline; tests/engines/test_own_engine.py has one",
    "backtalk train *engine.sampler*": "needs vLLM, or a server; tests/run/test_train_server.py has one",
    "backtalk train --openenv http:*": "needs a server; tests/envs/test_openenv.py has one",
    "backtalk train --preset qwen3-0.6b *": "needs a GPU",
    "backtalk train examples/textworld.yaml*": "needs Java; tests/envs/test_openenv.py plays it where there is one",
    "backtalk train examples/tinker.yaml*": "asks a service",
    "backtalk evaluate --model *": "needs Docker and a data set; tests/run/test_benchmark.py",
    "backtalk doctor --conformance": "a quarter of a minute; tests/sandboxes runs the suite",
    "backtalk study *": "minutes to hours; its plan is read, and all its runs' settings; ./demo runs one",
    "backtalk check --engine *": "tests/hosts and tests/engines run the suites of each",
}
IN_RECIPES = "hours, or minutes: a recipe says what it takes; tests/evidence runs its parts"
PROGRAM = {  # programs of others, and our own scripts: why they are not run
    "./demo*": "minutes; its options are those of backtalk study",
    "python3 -I /tests/fence.py *": "what a task's tests start; tests/tasks plays such tests",
    "./test": "this",
    "scripts/*": "makes environments, or takes minutes; .ci/run runs what the CPU allows",
    "python *": "minutes to hours, and fetches or writes what it needs; its options are read",
    "git *": "fetches",
    "pip *": "fetches; its extras are read",
    "uvicorn *": "serves; tests/envs/test_awm.py has the app",
    "vllm *": "needs a GPU",
    "harbor *": "scripts/harbor test runs Harbor",
    "inspect *": "another viewer; tests/exchange checks the log",
    "trackio *": "another viewer",
    "az *": "needs an account",
    "install *": "needs the kit",
}
SHELL = ("cd", "source", "export", "test", "mkdir", "ln", "sed", "echo", "tar", "[", ":")  # read by bash -n alone

Names = dict[str, Any]


def masks() -> Names:
    """Return a trainer's loss, log-probabilities of one row of four tokens, and whose the tokens are."""
    import torch

    return {
        "grpo_loss": torch.tensor(1.0),
        "logprobs_BT": torch.full((1, 4), -2.0),
        "env_mask_BT": torch.tensor([[False, True, True, False]]),
        "warning_mask_BT": torch.tensor([[False, False, False, True]]),
    }


def loss_is_right(names: Names) -> None:
    """Two nats on each of two environment tokens, over three tokens of the observation."""
    assert float(names["loss"]) == pytest.approx(1 + 0.05 * 4 / 3)


def my_trainer() -> Names:
    """Return names of a page's program in which the embedded engine answers for the trainer."""
    import backtalk.engines.conformance as suite
    from backtalk.engines.conformance.torch_engine import TorchUnderTest

    def few(trainer: Any) -> list[Any]:
        class Answered(trainer):  # the bodies of the page are left out
            train_step, own_grpo, _engine = TorchUnderTest.train_step, TorchUnderTest.own_grpo, TorchUnderTest._engine

            def __init__(self, model_folder: Path) -> None:
                super().__init__(model_folder)
                self._engines: dict[int, Any] = {}

        for name in ("train_step", "own_grpo"):
            asked, page = (inspect.signature(getattr(kind, name)) for kind in (TorchUnderTest, trainer))
            assert list(page.parameters) == list(asked.parameters)
        return suite.conformance(Answered, only=["target_env_only"])

    return {"few": few}


def places() -> Names:
    """Return places of an environment of one's own, and what a rollout says when it waits."""
    return {"places": asyncio.Lock()}


def trl_names() -> Names:
    """Return TRL's arguments by name; the trainer only takes them."""
    import backtalk.hosts.trl as host

    def bound(*args: Any, **given: Any) -> None:
        inspect.signature(host.EchoGRPOTrainer.__init__).bind(None, *args, **given)

    return dict.fromkeys(("model", "reward", "args", "dataset", "MyEnvironment")) | {"bound": bound}


@dataclass(frozen=True)
class Program:
    """How a page's programs are run: names that they take from around them, what is put in place of what."""

    names: Callable[[], Names] = dict
    after: Callable[[Names], None] = lambda names: None
    instead: tuple[tuple[str, str], ...] = ()


PYTHON: dict[str, list[Program | str]] = {  # how each page's programs are run, in order; a text says why one is not
    "README.md": [Program(masks, loss_is_right)],
    "docs/objective.md": [Program(masks, loss_is_right)],
    "docs/openenv.md": [Program()],
    "docs/worlds.md": [Program()],
    "docs/your_trainer.md": [Program(), Program()],
    "docs/engines.md": [Program(my_trainer, instead=(("in conformance(", "in few("),))],
    "docs/rollouts.md": [Program(places)],
    "docs/sandbox.md": ["needs a root file system; tests/sandboxes opens some: names are read"],
    "docs/security.md": ["a quarter of a minute; tests/sandboxes runs the suite, and counts it: names are read"],
    "docs/models.md": ["needs a package of 100 MB from the network: names are read"],
    "docs/settings.md": [Program(lambda: {"dataclass": __import__("dataclasses").dataclass, "MyEngine": object})],
    "docs/skyrl.md": ["needs SkyRL; tests/hosts runs it in .venv-skyrl: names are read"],
    "docs/trl.md": [Program(trl_names, instead=(("= EchoGRPOTrainer(", "= bound("),)), Program()],
    "docs/walk.md": ["is the loop of run/train.py: its lines are found there"],
}
SLOW_PAGES = ("docs/engines.md", "docs/trl.md")  # a suite; TRL, which is imported for many seconds

YAML = {  # what each page's settings are part of, in order: "study", or a file of settings with them in place of ...
    "docs/objective.md": ["..."],
    "docs/openenv.md": ["...", "tasks: {source: ...}", "tasks: {source: [{name: openenv:./my_env, options: ...}]}"],
    "docs/settings.md": ["..."],
    "docs/studies.md": ["study", "study", "study"],
    "docs/tasks.md": ["..."],
}
OTHER = {  # blocks in other languages, or in none: what holds them
    ("docs/capture.md", "text"): "lines of a script; tests/capture reads such lines",
    ("docs/coefficients.md", "toml"): "what export writes; its keys are compared",
    ("docs/coefficients.md", ""): "what export prints; its keys are compared",
    ("docs/openenv.md", "text"): "what account prints of two episodes; the column of the one that is here is compared",
    ("docs/studies.md", ""): "a format in words",
    ("docs/tasks.md", ""): "a folder in words",
    ("docs/tasks.md", "json"): "a row; it is read as one",
    ("recipes/world_model/README.md", "text"): "what a policy wrote",
}

# ---------------------------------------------------------------- blocks and commands of the pages


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    number: int  # among the page's blocks of that language
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.language}-{self.number}"


def find_blocks() -> Iterator[Block]:
    for path in PAGES:
        page, seen = str(path.relative_to(ROOT)), dict[str, int]()
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", path.read_text(), flags=re.MULTILINE | re.DOTALL):
            number = seen[match[2]] = seen.get(match[2], -1) + 1
            yield Block(page, match[2], number, match[3])


BLOCKS = list(find_blocks())


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def split(script: str) -> Iterator[str]:
    """Yield the commands of a script, each on one line, without what steers the shell around them."""
    script = re.sub(r"<<'(\w+)'.*?\n(.*?)^\1$", "", script, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="([^"$]*)"$', script, flags=re.MULTILINE):
        script = script.replace(f"${name} ", f"{value} ")
    for line in script.splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|") and word:
                if words := without_shell(words):
                    yield shlex.join(words)
                words = []
            else:
                words.append(word)


def without_shell(words: list[str]) -> list[str]:
    """Return a command without loop words, variables set in front, redirections, and `nice`."""
    kept = list(words)
    while kept and (
        kept[0] in ("do", "done", "then", "else", "fi", "while", "if") or re.match(r"[A-Za-z_]+=", kept[0])
    ):
        kept.pop(0)
    if kept[:1] in (["for"], ["case"]):
        return []
    if kept[:2] == ["nice", "-n"]:
        kept = kept[3:]
    for mark in (">", "<"):
        if mark in kept:
            kept = kept[: kept.index(mark)]
    return kept


def find_commands() -> Iterator[tuple[str, str]]:
    """Yield each page and command of it: in blocks, indented, and on top of the examples."""
    for block in of("bash"):
        for command in split(block.text):
            yield block.page, command
    for path in PAGES:
        outside = re.sub(r"```.*?```|\\\n", "", path.read_text(), flags=re.DOTALL)
        for line in re.findall(r"^    ((?:backtalk|python) .*)$", outside, flags=re.MULTILINE):
            yield from ((str(path.relative_to(ROOT)), command) for command in split(line))
    for path in PROGRAMS:
        text = re.sub(r"\\\n#?", " ", path.read_text())
        for line in re.findall(
            r"^(?:# +)?((?:[A-Z_]+=\S+ )?(?:\S+/bin/)?(?:backtalk|python) [^`\n]*?)(?:, .*)?$", text, re.M
        ):
            yield from ((str(path.relative_to(ROOT)), command) for command in split(line))


FOUND = list(find_commands())


def words_of(command: str) -> list[str]:
    words = shlex.split(command)
    return [Path(words[0]).name if "/bin/" in words[0] else words[0], *words[1:]]


def row_of(command: str, table: dict[str, Any]) -> str | None:
    """Return the pattern of a table that a command matches first."""
    text = " ".join(words_of(command))
    return next((pattern for pattern in table if fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))), None)


def folder_of(page: str) -> Path:
    """Return the folder that a page's commands are typed in."""
    moved = re.search(r"^cd (recipes/\w+)", (ROOT / page).read_text(), flags=re.MULTILINE)
    return ROOT / moved[1] if moved else ROOT


def is_ours(command: str) -> bool:
    return words_of(command)[0] == "backtalk"


def without_names(command: str) -> str:
    """Return a command without the names of runs and models: commands that differ in these alone are run once."""
    return re.sub(r" --(out|model) \S+|(?<=runs/)\w+", "", command)


CAN_RUN = [command for page, command in FOUND if row_of(command, READ) is None and row_of(command, RUN)]
TO_RUN = list({without_names(command): command for command in reversed(CAN_RUN)}.values())[::-1]


def test_every_command_is_run_or_read_and_the_tables_say_which() -> None:
    used, lost = set[str](), []
    for page, command in FOUND:
        rows = [row_of(command, table) for table in (READ, RUN, PROGRAM)]
        used.update([row for row in rows if row][:1])
        in_recipe = page.startswith("recipes/") and is_ours(command)
        if not any(rows) and not in_recipe and words_of(command)[0] not in SHELL:
            lost.append(f"{page}: {command}")
    assert not lost, "run them, or say why not:\n" + "\n".join(lost)
    assert not (stale := {*READ, *RUN, *PROGRAM} - used), f"no page has a command of {sorted(stale)}"


def test_every_other_block_is_in_a_table() -> None:
    for table, language in ((PYTHON, "python"), (YAML, "yaml")):
        pages = [block.page for block in of(language)]
        assert {page: pages.count(page) for page in pages} == {page: len(rows) for page, rows in table.items()}
    others = {(b.page, b.language) for b in BLOCKS if b.language not in ("bash", "python", "yaml")}
    assert others == set(OTHER)


# ---------------------------------------------------------------- read against the code


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_every_script_is_bash(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize(("page", "command"), list(dict.fromkeys(filter(lambda row: is_ours(row[1]), FOUND))))
def test_every_command_of_ours_is_one_with_settings_that_a_run_takes(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_of(page))
    name, given = parsed(words_of(command)[1:])
    settings = list(given.get("settings") or [])
    if name == "train":
        from backtalk.cli.train import _resolve

        overrides = settings + ([f"engine.model={given['model']}"] if given["model"] else [])
        overrides += [f"tasks.source=openenv:{given['openenv']}"] if given["openenv"] else []
        source = None if given["config"] in ("my_run.yaml", "my.yaml") else given["config"]
        preset = given["preset"] or (None if source or "tasks.source" in command or given["openenv"] else "triage")
        if "my_module:MyEngineConfig" not in command:
            _resolve(source, preset, overrides, None, False)
    elif name == "study" and "$" not in given["source"]:
        from backtalk.evidence.study import load_study

        if given["source"] == "study.yaml" and not Path("study.yaml").exists():
            return  # the page's own: test_every_settings_file_is_taken
        study = load_study(given["source"], seeds=given["seeds"] or None, overrides=settings)
        assert [study.config(arm, seed) for arm in study.arms for seed in study.seeds]
    elif name == "capture":
        from backtalk.cli.capture import _config, _source

        if given["world"] == "WORLD":
            return
        world = given["world"]
        assert _config(world, _source(world, given["task"]), settings, given["max_turns"], 0, given["human"])
    else:
        config_from_dict({}, settings)


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return a command's name and what its options hold, as the command line reads them."""
    command = COMMANDS
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"there is no command {words[:1]}"
        command, words = command.commands[words[0]], words[1:]
    return command.name, command.make_context(command.name, list(words)).params


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_sentence_has_its_options(path: Path) -> None:
    outside = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for line in re.findall(r"`(backtalk [^`]+)`", outside):
        command, words = COMMANDS, shlex.split(" ".join(line.split()))[1:]
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{line}: there is no command {words[0]!r}"
            command, words = command.commands[words[0]], words[1:]
        known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        wrong = (
            {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - known - {"--help", "--debug"}
        )
        assert not wrong, f"{line}: there is no {sorted(wrong)}"


SCRIPTS = [(page, c) for page, c in FOUND if re.match(r"(\S*python3?|scripts/\S+|\./\S+|pip) ?", c)]


@pytest.mark.parametrize(("page", "command"), SCRIPTS)
def test_every_program_of_ours_is_there_with_its_options(page: str, command: str) -> None:
    words = words_of(command)
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[([\w,]+)\]", command)
        assert set(",".join(named).split(",")) - {""} <= set(extras)
        return
    program, *given = [w for w in words if not w.startswith("python") and w not in ("-I", "-")] or ["demo"]
    if "$" in program or program.startswith("/"):
        return
    folder = folder_of(page)
    path = next((p for p in (folder / program, ROOT / "examples" / program) if p.is_file()), None)
    assert path is not None, f"there is no {program}"
    if program == "./demo":
        parsed(["study", "demo", *given])
        return
    more = (ROOT / "benchmarks/gpu_check").glob("*.py") if path.name == "gpu_check" else ()
    text = "".join(file.read_text() for file in (path, *more))
    text += re.sub(r"^ +(\w+): \w+ = .*", lambda field: f"--{field[1].replace('_', '-')}", text, flags=re.MULTILINE)
    wrong = [w for w in given if w.startswith("--") and w.partition("=")[0] not in text]
    assert not wrong, f"{program} has no {wrong}"


# ---------------------------------------------------------------- programs and settings


def programs() -> Iterator[Any]:
    for block in of("python"):
        row = PYTHON[block.page][block.number] if block.number < len(PYTHON.get(block.page, [])) else "in no table"
        slow = [pytest.mark.slow] if block.page in SLOW_PAGES else []
        yield pytest.param(block, row, id=str(block), marks=slow)


@pytest.mark.parametrize(("block", "row"), list(programs()))
def test_every_program_runs_or_has_names_that_exist(
    block: Block, row: Program | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = block.text
    code = compile(text, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if block.page == "docs/walk.md":
        loop = (ROOT / "src/backtalk/run/train.py").read_text()
        lines = [re.sub(r"\s*#.*|await ", "", line).strip() for line in text.splitlines()]
        assert [line for line in lines if line not in loop.replace("await ", "")] == []
    elif isinstance(row, str):
        names_exist(text)
    else:
        names = row.names()
        for old, new in row.instead:
            assert old in text
            text = text.replace(old, new)
        code = compile(text, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.iscoroutine(result):
            asyncio.run(result)
        row.after(names)


def names_exist(program: str) -> None:
    """Raise where a program takes a name of ours that no module has."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("backtalk"):
            path = ROOT / "src" / (node.module or "").replace(".", "/")
            source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
            made = ast.walk(ast.parse(source.read_text()))
            there = {getattr(one, "name", None) for one in made}
            assert {alias.name for alias in node.names} <= there, node.module


def test_the_number_of_a_sandbox_suite_on_a_page_is_right() -> None:
    from backtalk.sandboxes.conformance import CHECKS

    assert f"# {len(CHECKS)} checks" in (ROOT / "docs/security.md").read_text()


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_every_settings_file_is_taken(block: Block, tmp_path: Path) -> None:
    path, part = tmp_path / "page.yaml", YAML[block.page][block.number]
    if part == "study":
        from backtalk.evidence.study import load_study

        tree = yaml.safe_load(block.text)
        path.write_text(yaml.safe_dump({"base": "triage", "arms": ["grpo"]} | tree))
        study = load_study(path)
        assert [study.config(arm, seed) for arm in study.arms for seed in study.seeds]
        return
    inner = yaml.safe_load(block.text)
    whole = inner if part == "..." else put_in(yaml.safe_load(part), inner)
    path.write_text(yaml.safe_dump({"base": "triage"} | whole))
    config = load_config(path)
    from backtalk.envs.openenv.config import OpenEnvConfig

    for source in config.tasks.sources:
        if source.name.startswith("openenv:"):
            from_plain(OpenEnvConfig, source.options, "options")


def put_in(tree: Any, inner: Any) -> Any:
    if isinstance(tree, dict):
        return {key: put_in(value, inner) for key, value in tree.items()}
    if isinstance(tree, list):
        return [put_in(value, inner) for value in tree]
    return inner if tree == "..." else tree


@pytest.mark.parametrize("path", [p for p in PROGRAMS if p.suffix == ".yaml"], ids=lambda path: path.name)
def test_every_settings_file_of_the_examples_is_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    if path.name != "openenv.yaml":
        load_config(path)


def block_of(page: str, language: str) -> str:
    return next(block.text for block in BLOCKS if (block.page, block.language) == (page, language))


def test_a_row_of_a_task_is_one(tmp_path: Path) -> None:
    from backtalk.tasks.rows import read_row_file

    row = json.loads(block_of("docs/tasks.md", "json"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (task,) = read_row_file(tmp_path / "rows.jsonl")
    assert task.id == "count"


def test_what_a_verifier_of_a_page_writes(tmp_path: Path) -> None:
    script = next(block.text for block in of("bash") if block.page == "docs/tasks.md")
    (tmp_path / "agent").mkdir()
    (tmp_path / "verifier").mkdir()
    for answer, reward in (("42", "1"), ("41", "0")):
        (tmp_path / "agent/answer.txt").write_text(answer)
        subprocess.run(["bash", "-c", script.replace("/logs", str(tmp_path))], check=True)
        assert (tmp_path / "verifier/reward.txt").read_text().strip() == reward


# ---------------------------------------------------------------- run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the pages suppose: models, and a world and an engine of one's own."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("examples", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "Qwen").mkdir()
    for name in ("Qwen/Qwen3-0.6B", "my_model", "model"):
        (folder / name).symlink_to(ROOT / "src/backtalk/assets/base_model")
    (folder / "guess_world.py").write_text(block_of("docs/worlds.md", "python"))
    (folder / "my_module.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from guess_world import GuessWorld as MyWorld\n" + block_of("docs/settings.md", "python")
    )
    return folder


Call = Callable[..., None]


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(typer, "launch", lambda address: 0)

    def run(*arguments: str, typed: str = "") -> None:
        monkeypatch.setattr(sys, "argv", ["backtalk", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, f"backtalk {shlex.join(arguments)} exits with {stop.code}"

    return run


@pytest.fixture
def supposed(place: Path, call: Call) -> Callable[[list[str]], None]:
    """Make the files that a command reads, where no command before it has made them."""

    def trained(name: str) -> None:
        if not (place / "runs/kept").exists():
            longer = "--set steps=2 --set rollout.max_turns=3 --set rollout.max_tokens_per_turn=64"
            call("train", "--preset", "triage", "--out", "runs/kept", *shlex.split(f"{TINY} {longer}"))
        shutil.rmtree(place / name, ignore_errors=True)
        shutil.copytree(place / "runs/kept", place / name)

    def episodes(name: str, kind: str) -> None:
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        if kind == "ours":
            shutil.copy(ROOT / "examples/episodes/shop.jsonl", place / name)
        else:
            out = f"{kind}.jsonl"
            if not (place / out).exists():
                call("export", "examples/episodes/shop.jsonl", "--format", kind, "--out", out)
            lines = (place / out).read_text()
            (place / name).write_text(lines)

    def make(words: list[str]) -> None:
        out = words[words.index("--out") + 1] if "--out" in words else None
        if out is not None and "--resume" not in words:
            for made in (place / out, place / f"{out}.scores.parquet"):
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        for word in words[1:]:
            if word == out and "--resume" not in words:
                continue
            if word == "runs/study":
                trained("runs/study/echo_seed0")
            elif re.fullmatch(r"runs/\w+", word):
                trained(word)
            elif word in ("mine.jsonl", "their.jsonl", "case.jsonl"):
                episodes(word, "ours")
            elif word == "episode.json":
                episodes(word, "episode-record")
            elif word == "jobs/trial.jsonl":
                episodes(word, "atif")
            elif word == "jobs/2026-11-30":  # a job of Harbor, of one trial
                episodes(f"{word}/shop__a/agent/trajectory.json", "atif")
                result = {"trial_name": "shop__a", "task_name": "shop", "verifier_result": {"rewards": {"reward": 1.0}}}
                (place / word / "shop__a/result.json").write_text(json.dumps(result))
            elif word == "trl.parquet":
                import pyarrow as pa
                import pyarrow.parquet as pq

                row = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "logprobs": [-0.5, -1.0], "reward": 0.5}
                pq.write_table(pa.Table.from_pylist([row]), place / word)
            elif word == "my_tasks" and not (place / word).exists():
                call("tasks", "write", word, "--count", "2", "--level", "1")

    return make


@pytest.mark.slow
@pytest.mark.parametrize("command", TO_RUN)
def test_every_command_that_is_run_ends_well(
    command: str, place: Path, call: Call, supposed: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(command, RUN)
    assert row is not None
    more, typed = RUN[row]
    words = words_of(command)
    supposed(words)
    if words[0] == "backtalk":
        if words[1] == "view" and "--export" in words:
            more = ""
        (place / "runs").mkdir(exist_ok=True)
        call(*words[1:], *shlex.split(more), typed=typed)
    else:
        if "--out" in words:
            words[words.index("--out") + 1] = str(place / "drawn.png")
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
