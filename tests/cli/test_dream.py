"""`backtalk dream`: a policy asked for answers before it sees them, in a real shell and of a rollout on record."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from backtalk.cli.app import app
from backtalk.cli.dream import comparison
from backtalk.envs.base import text_tool
from backtalk.envs.terminal import BASH, SUBMIT
from backtalk.errors import ConfigError, SandboxUnavailable
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.run.config import config_to_dict, load_config
from backtalk.run.dream import Dreamed, text_argument
from backtalk.run.log import RunLog
from backtalk.sandboxes import local_sandbox
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_model_dir, tiny_tokenizer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of a tiny model that is about to begin, with one rollout on record."""
    try:
        local_sandbox("auto")
        sandbox = "auto"
    except SandboxUnavailable:
        sandbox = "unsafe"
    model, log = tiny_model_dir(tmp_path_factory.mktemp("model")), RunLog(tmp_path_factory.mktemp("run"))
    changes = {"engine.model": str(model), "engine.device": "cpu", "sandbox": sandbox, "evaluation.tasks": 0}
    log.write_config(config_to_dict(load_config("triage", changes)))
    AutoTokenizer.from_pretrained(model).save_pretrained(log.tokenizer_path)
    renderer = Renderer(tiny_tokenizer(), (BASH, SUBMIT))
    segments = [*renderer.render_prompt([Message("user", (Part("look around", TokenRole.CONTEXT),))])]
    segments.append(Segment(TokenRole.ACTION, renderer.encode_action(ToolCall("bash", {"command": "ls -a"})), None, 0))
    answer = Message("tool", (Part("notes.txt", TokenRole.ENV_OUTPUT),), "bash")
    segments += renderer.render_observation([answer], turn=0, closed=True)
    trajectory = Trajectory(task_id="a", sample_index=0, segments=tuple(segments), reward=0.0)
    log.write_groups(0, [TrajectoryGroup("a", (trajectory,))])
    return log.folder


def dream(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["dream", str(folder), "--base", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_are_carried_out_and_their_answers_stand_beside_what_was_expected(run_folder: Path) -> None:
    shown = dream(run_folder, "echo hello world; echo second", "pwd")
    assert "$ echo hello world; echo second" in shown and "hello world" in shown.split("$ echo", 1)[1]
    assert "0 of 2 lines expected" in shown and shown.count("nats a token") == 3  # and once in the legend
    assert "/home/agent" in shown.split("$ pwd")[1]
    first, second = RunLog(run_folder).read_dreams()[-2:]
    assert (first["step"], first["command"]) == (0, "$ echo hello world; echo second")
    assert "hello world\nsecond" in first["actual"] and first["ce"] > 0 and "/home/agent" in second["actual"]


def test_the_turns_of_a_rollout_on_record_are_asked_for(run_folder: Path) -> None:
    shown = dream(run_folder, "--step", "0")
    assert "ls -a" in shown and "notes.txt" in shown and "0 of 1 lines expected" in shown


@pytest.mark.parametrize("arguments", [(), ("ls", "--step", "0")])
def test_what_cannot_be_asked_is_refused(run_folder: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"nothing says what to ask|--step is about commands on record"):
        dream(run_folder, *arguments)


def test_lines_that_were_expected_are_counted_and_surprise_has_a_colour() -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, (BASH,))
    ids = tuple(tokenizer.encode("one\ntwo", add_special_tokens=False))
    dreamed = Dreamed("cat x", "two\nthree", ids, (0.1,) * (len(ids) - 1) + (3.0,))
    console = Console(width=80, record=True, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(comparison(dreamed, renderer))
    assert "1 of 2 lines expected" in capture.get()
    assert "\x1b[32m" in capture.get() and "\x1b[31m" in capture.get()  # green and red


def test_a_tool_of_one_text_is_what_a_line_is_for() -> None:
    assert text_argument(text_tool("run", "runs", "line", "what")) == "line"
    two = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
    assert text_argument(ToolSpec("both", "", two)) is None
