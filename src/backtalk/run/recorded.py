"""Recorded trajectories of another policy, on which the cross-entropies of all evaluations can be compared.

The package's own are of held-out triage tasks. They are kept as tokens of the embedded model, with who made each; their
text and messages can be read back exactly, so they are rendered anew for the model that is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from backtalk.envs.terminal import TOOLS
from backtalk.errors import ConfigError, RenderError
from backtalk.language.history import History
from backtalk.language.renderer import Renderer
from backtalk.language.tokenizer import load_tokenizer, model_location
from backtalk.messages import Message, Part
from backtalk.run.config import TrainConfig
from backtalk.run.log import read_trajectories
from backtalk.run.worlds import OnNotice
from backtalk.trajectory import Segment, TokenRole, Trajectory

SHIPPED = "assets/recorded/held_out.parquet"
_MESSAGE_OPENING = re.compile(r"<\|im_start\|>(\w+)\n")  # in the chat template of the embedded model


def recorded_trajectories(config: TrainConfig, renderer: Renderer, on_notice: OnNotice) -> list[Trajectory]:
    """Return the recorded trajectories of a run's evaluations, in the tokens of its model.

    Of the package's own as many as an evaluation has rollouts, the first ones, so that a short evaluation stays short.
    ``on_notice`` is called with the reason if there are none.

    Raises:
        DataError: the file cannot be read.
        ConfigError: ``evaluation.recorded_path`` holds tokens that the model does not have.
    """
    if config.evaluation.tasks == 0:
        return []
    if config.evaluation.recorded_path is not None:
        tokenizer: Any = renderer.tokenizer
        trajectories = read_trajectories(config.evaluation.recorded_path)
        if (highest := max((token for t in trajectories for token in t.token_ids), default=0)) >= len(tokenizer):
            raise ConfigError(
                f"{config.evaluation.recorded_path} holds token {highest}, and this model has only {len(tokenizer)}; "
                "record it with the same tokenizer, or leave evaluation.recorded_path out"
            )
        return trajectories
    if all(source.name != "triage" for source in config.tasks.sources):
        on_notice(
            "there are no recorded trajectories of these tasks, so held-out cross-entropy is measured on the model's "
            "own rollouts only; set evaluation.recorded_path to the groups/*.parquet of a run with the same tokenizer"
        )
        return []
    path = Path(str(resources.files("backtalk").joinpath(SHIPPED)))
    if not path.exists():
        on_notice(f"{path} is missing, so the cross-entropy on recorded trajectories is not measured")
        return []
    tools = tuple(TOOLS.values())
    source = Renderer(load_tokenizer(model_location("base")), tools)
    try:
        target = renderer.for_tools(tools)
        count = config.evaluation.tasks * config.evaluation.samples_per_task
        return [render_again(trajectory, source, target) for trajectory in read_trajectories(path)[:count]]
    except RenderError as error:
        on_notice(f"recorded trajectories cannot be rendered for this model, so they are not measured: {error}")
        return []


def render_again(trajectory: Trajectory, source: Renderer, target: Renderer) -> Trajectory:
    """Return a trajectory in the tokens, chat template and tool format of ``target``.

    ``source`` is the embedded model's renderer, which wrote it. Its actions become unsampled ones.

    Raises:
        RenderError: the target's chat template or tool format cannot hold it.
    """
    history, segments = History(), []
    for step in _steps(trajectory, source):
        if isinstance(step, Segment):
            action = source.parse_action(step.token_ids, stopped=True)
            call = action.calls[0] if len(action.calls) == 1 else None
            ids = target.encode_text(action.text) if call is None else target.encode_action(call)
            segments.append(Segment(TokenRole.ACTION, ids, turn=history.turns, branch=history.branch))
            history.act(ids)
        else:
            segments += history.observe(step, target) if history.turns else history.begin(step, target)
    return replace(trajectory, segments=tuple(segments))


def _steps(trajectory: Trajectory, source: Renderer) -> Iterator[list[Message] | Segment]:
    """Yield the prompt's messages, then each action and the messages that answer it, if there are any."""
    messages: list[Message] = []
    for segment in trajectory.segments:
        if segment.role is TokenRole.ACTION:
            if messages:
                yield messages
            yield segment
            messages = []
            continue
        text = source.encoder.decode(segment.token_ids)
        if segment.role is TokenRole.TEMPLATE:
            roles = [role for role in _MESSAGE_OPENING.findall(text) if role != "assistant"]
            messages += [Message(role, (), segment.tool) for role in roles]
        else:
            parts = (*messages[-1].parts, Part(text, segment.role))
            messages[-1] = replace(messages[-1], parts=parts)
    if messages:
        yield messages
