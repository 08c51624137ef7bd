"""Let a policy play the terminal: what it expects a command to be answered with, beside what really comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backtalk.envs.base import Env
from backtalk.errors import ConfigError
from backtalk.language.history import History
from backtalk.language.renderer import Renderer
from backtalk.messages import ToolCall, ToolSpec
from backtalk.rollout.sampler import Sampler, SamplingParams
from backtalk.run.config import config_from_dict
from backtalk.run.events import OnEvent
from backtalk.run.log import RunLog
from backtalk.run.train import Run, open_trained
from backtalk.run.world_model import MAX_PREDICTED, Answer, find_answers, predict
from backtalk.trajectory import Segment, TokenRole, Trajectory


@dataclass(frozen=True, slots=True)
class Dreamed:
    """What a policy expected of one action, and what came; ``nats`` are of each token of ``actual``."""

    command: str  # as it is shown
    expected: str
    actual: tuple[int, ...]
    nats: tuple[float, ...]
    done: bool = False  # the environment ended the rollout


def to_record(dreamed: Dreamed, renderer: Renderer, *, step: int) -> dict[str, Any]:
    """Return its line in a run's dreams.jsonl; ``step`` is that of the policy."""
    return {
        "step": step,
        "command": dreamed.command,
        "expected": dreamed.expected,
        "actual": renderer.encoder.decode(dreamed.actual),
        "ce": sum(dreamed.nats) / len(dreamed.nats) if dreamed.nats else None,
    }


class Dream:
    """A policy and the answers that it is asked for, before it sees them."""

    def __init__(self, run: Run, temperature: float) -> None:
        params = SamplingParams(temperature=temperature, max_tokens=MAX_PREDICTED, seed=run.config.seed)
        self.run = run
        self._sampler: Sampler = run.engine.sampler(params)

    async def answers(self, trajectory: Trajectory, renderer: Renderer, last: int | None = None) -> list[Dreamed]:
        """Return expected beside actual answers to a rollout's commands, or to the ``last`` of them."""
        logprobs = (await self.run.engine.score([trajectory]))[0]
        answers = find_answers(trajectory, renderer)
        return [await self._compare(answer, logprobs, renderer) for answer in answers[-last if last else 0 :]]

    async def _compare(self, answer: Answer, logprobs: Sequence[float], renderer: Renderer) -> Dreamed:
        expected = await predict(self._sampler, renderer, answer, MAX_PREDICTED)
        nats = tuple(-x for x in logprobs[answer.start : answer.start + len(answer.body)])
        return Dreamed(_command(answer.action, renderer), expected, answer.body, nats)


class LiveDream:
    """A rollout in a real environment whose commands a person gives."""

    def __init__(self, dream: Dream, env: Env, tool: ToolSpec) -> None:
        self._dream, self._env, self._tool = dream, env, tool
        self.renderer = dream.run.renderer.for_tools(env.tools)
        self._history = History()
        self.instruction = ""

    async def begin(self) -> None:
        """Set the task up."""
        messages = await self._env.reset()
        self.instruction = messages[-1].text
        self._history.begin(messages, self.renderer)

    async def answer(self, command: str) -> Dreamed:
        """Carry a command out; return what the policy expected and what came."""
        call = ToolCall(self._tool.name, {text_argument(self._tool) or "": command})
        before, action = tuple(self._history.token_ids), self.renderer.encode_action(call)
        turn = self._history.turns
        self._history.act(action)
        step = await self._env.step(call)
        messages = [replace(message, tool=message.tool or call.tool) for message in step.messages]
        if not messages:
            return Dreamed(f"$ {command}", "", (), (), step.done)
        rewritten = self._history.branch
        segments = [replace(s, branch=0) for s in self._history.observe(messages, self.renderer)]
        if self._history.branch == rewritten:
            segments = [Segment(TokenRole.CONTEXT, before), Segment(TokenRole.ACTION, action, None, turn), *segments]
        found = await self._dream.answers(
            Trajectory(task_id="", sample_index=turn, segments=tuple(segments)), self.renderer, 1
        )
        dreamed = found[0] if found else Dreamed(command, "", (), ())
        return replace(dreamed, command=f"$ {command}", done=step.done)


@asynccontextmanager
async def open_dream(
    folder: Path,
    *,
    base: bool = False,
    temperature: float = 0.0,
    overrides: Sequence[str] = (),
    on_event: OnEvent = lambda event: None,
) -> AsyncIterator[Dream]:
    """Open the policy of a run's checkpoint, or with ``base`` the model that the run began with, and its worlds.

    Raises:
        DataError: the folder is no run, or has no checkpoint yet.
    """
    log = RunLog(folder)
    config = config_from_dict(log.read_config(), overrides)
    async with open_trained(log, config, base=base, on_event=on_event) as run:
        yield Dream(run, temperature)


@asynccontextmanager
async def open_live(dream: Dream, task: int) -> AsyncIterator[LiveDream]:
    """Open the environment of a held-out task, by its number, for commands that a person gives.

    Raises:
        ConfigError: no such task, or its environment has no tool that takes one text.
    """
    tasks = dream.run.held_out
    if task >= len(tasks):
        raise ConfigError(f"--task {task}: the run has {len(tasks)} held-out tasks; use 0 to {len(tasks) - 1}")
    async with dream.run.worlds.open(tasks[task]) as env:
        tool = next((tool for tool in env.tools if text_argument(tool) is not None), None)
        if tool is None:
            names = ", ".join(tool.name for tool in env.tools)
            raise ConfigError(f"no tool of this world takes one text, so a line is no call of one; it has {names}")
        live = LiveDream(dream, env, tool)
        await live.begin()
        yield live


def text_argument(tool: ToolSpec) -> str | None:
    """Return the name of a tool's one argument if that is a text; None for any other tool."""
    arguments: Mapping[str, Any] = tool.parameters.get("properties", {})
    names = [name for name, schema in arguments.items() if schema.get("type") == "string"]
    return names[0] if len(names) == len(arguments) == 1 else None


def _command(action: Sequence[int], renderer: Renderer) -> str:
    """Return the text of an action as the policy wrote it, without the token that ends it."""
    return renderer.encoder.decode(action[:-1] if action and action[-1] in renderer.stop_token_ids else action)
