"""The package's recorded trajectories, in the tokens of its own model and of any other."""

from __future__ import annotations

from collections import defaultdict
from importlib import resources
from pathlib import Path

import pytest

from backtalk.envs.terminal import TOOLS
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tokenizer import load_tokenizer, model_location
from backtalk.messages import Message, Part, ToolCall
from backtalk.run.config import load_config
from backtalk.run.log import read_trajectories
from backtalk.run.recorded import SHIPPED, recorded_trajectories, render_again
from backtalk.trajectory import Segment, TokenRole, Trajectory
from families import tokenizer_of

ENV, WARNING = TokenRole.ENV_OUTPUT, TokenRole.WARNING
FILE = Path(str(resources.files("backtalk").joinpath(SHIPPED)))


@pytest.fixture(scope="module")
def source() -> Renderer:
    return Renderer(load_tokenizer(model_location("base")), tuple(TOOLS.values()))


def observed(trajectory: Trajectory, renderer: Renderer) -> dict[tuple[TokenRole, int | None, str | None], str]:
    """Return what environment and harness said, by role, turn and tool."""
    said = defaultdict(str)
    for s in trajectory.segments:
        if s.role in (TokenRole.ENV_OUTPUT, TokenRole.WARNING):
            said[s.role, s.turn, s.tool] += renderer.encoder.decode(s.token_ids)
    return dict(said)


def calls(trajectory: Trajectory, renderer: Renderer) -> list[tuple[ToolCall, ...]]:
    parsed = [renderer.parse_action(s.token_ids, stopped=True) for (s,) in trajectory.actions]
    assert all(not action.warnings for action in parsed)
    return [action.calls for action in parsed]


def test_the_embedded_models_own_are_the_file_token_for_token(source: Renderer) -> None:
    trajectories = read_trajectories(FILE)
    assert len(trajectories) >= 100
    for trajectory in trajectories:
        made = render_again(trajectory, source, source)
        assert made.token_ids == trajectory.token_ids and made.roles == trajectory.roles
        assert [(s.turn, s.tool) for s in made.segments] == [(s.turn, s.tool) for s in trajectory.segments]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3"])
def test_another_model_gets_the_same_calls_and_answers_in_its_own_tokens(name: str, source: Renderer) -> None:
    target = Renderer(tokenizer_of(name), source.tools, RendererConfig(on_drift="fork"))
    for trajectory in read_trajectories(FILE)[:20]:
        made = render_again(trajectory, source, target)
        assert observed(made, target) == observed(trajectory, source)
        assert calls(made, target) == calls(trajectory, source)
        assert made.token_ids != trajectory.token_ids and made.task_id == trajectory.task_id
        assert not any(segment.is_sampled for segment in made.segments)
        given = "".join(target.encoder.decode(s.token_ids) for s in made.segments if s.role is TokenRole.CONTEXT)
        assert "You work in a Linux shell." in given and "Alert: " in given


def test_an_answer_at_the_end_and_an_action_without_a_call_are_kept(source: Renderer) -> None:
    """Written by the embedded model: an empty answer, a warning beside output, and text that is no call."""
    prompt = source.render_prompt([Message("user", (Part("Look around.", TokenRole.CONTEXT),))])
    answer = [Message("tool", (), "bash"), Message("tool", (Part("a b\n", ENV), Part("[cut]\n", WARNING)), "bash")]
    segments = (
        *prompt,
        Segment(TokenRole.ACTION, source.encode_text("I do not know."), turn=0),
        *source.render_observation(answer, turn=0, closed=True),
    )
    trajectory = Trajectory(task_id="a", sample_index=0, segments=segments)
    again = render_again(trajectory, source, source)
    assert (again.token_ids, again.roles) == (trajectory.token_ids, trajectory.roles)
    target = Renderer(tokenizer_of("qwen2_5"), source.tools)
    made = render_again(trajectory, source, target)
    assert observed(made, target) == {(ENV, 0, "bash"): "a b\n", (WARNING, 0, "bash"): "[cut]\n"}
    assert target.encoder.decode(made.actions[0][0].token_ids) == "I do not know.<|im_end|>"


def test_a_run_measures_them_where_its_tasks_are_triage() -> None:
    renderer, notices = Renderer(tokenizer_of("qwen2_5"), ()), []
    config = load_config("triage")
    assert len(recorded_trajectories(config, renderer, notices.append)) == len(read_trajectories(FILE))
    short = load_config("triage", ["evaluation.tasks=3", "evaluation.samples_per_task=2"])
    assert len(recorded_trajectories(short, renderer, notices.append)) == 6
    assert not notices
    assert recorded_trajectories(load_config("triage", ["evaluation.tasks=0"]), renderer, notices.append) == []
    assert recorded_trajectories(load_config("triage", ["tasks.source=workbench"]), renderer, notices.append) == []
    assert len(notices) == 1 and "no recorded trajectories of these tasks" in notices[0]
