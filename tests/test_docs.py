"""What the pages say can be typed: commands and their options exist, programs compile, those of the first pages run."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from backtalk.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("README.md"))]
RUN = {  # pages whose programs are run, with what a fragment takes from the trainer around it
    "docs/your_trainer.md": "",
    "docs/openenv.md": "",
    "docs/worlds.md": "",
    "README.md": "masks",
    "docs/objective.md": "masks",
}
COMMANDS: Any = typer.main.get_command(app)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def typed(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `backtalk` command in a page's blocks and in its sentences."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(backtalk [^`]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    for line in lines:
        words = shlex.split(" ".join(line.split()), comments=True)
        if words[:1] == ["backtalk"]:
            yield words[1:]


def check(arguments: list[str]) -> None:
    """Raise where a command or one of its options does not exist."""
    command, words = COMMANDS, list(arguments)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help", "--debug"}
    if command is COMMANDS:
        known |= {name for param in COMMANDS.params for name in param.opts}
    wrong = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} - known
    assert not wrong, f"{command.name} has no {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_exists_with_its_options(page: Path) -> None:
    for arguments in typed(page):
        try:
            check(arguments)
        except AssertionError as error:
            raise AssertionError(f"{page.name}: backtalk {' '.join(arguments)}: {error}") from None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_program_on_a_page_is_python(page: Path) -> None:
    for program in blocks(page, "python"):
        compile(program, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def masks() -> dict[str, Any]:
    """Return a trainer's loss, log-probabilities of one row of four tokens, and whose the tokens are."""
    import torch

    return {
        "grpo_loss": torch.tensor(1.0),
        "logprobs_BT": torch.full((1, 4), -2.0),
        "env_mask_BT": torch.tensor([[False, True, True, False]]),
        "warning_mask_BT": torch.tensor([[False, False, False, True]]),
    }


@pytest.mark.parametrize("name", RUN)
def test_the_programs_of_a_page_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for program in blocks(ROOT / name, "python"):
        names = masks() if RUN[name] else {}
        exec(compile(program, name, "exec"), names)
        if RUN[name]:  # two nats on each of two environment tokens, over three tokens of the observation
            assert float(names["loss"]) == pytest.approx(1 + 0.05 * 4 / 3)
