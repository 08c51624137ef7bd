"""A step in numbers, and an evaluation of a scripted policy end to end."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from backtalk.envs.base import Step
from backtalk.envs.terminal import BASH, SUBMIT
from backtalk.errors import VerifierError
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.sampler import SamplingParams, ScriptedSampler
from backtalk.run.evaluate import evaluate
from backtalk.run.rollouts import rollout_metrics, time_metrics
from backtalk.tasks.task import Task
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_tokenizer

# ---------------------------------------------------------------- a step in numbers


def rollout(reward: float | None, *, failed: bool = False, index: int = 0, **stats: float) -> Trajectory:
    return Trajectory(
        task_id="a",
        sample_index=index,
        segments=(
            Segment(TokenRole.CONTEXT, (1, 2)),
            Segment(TokenRole.ACTION, (3, 4, 5), (-1.0,) * 3, 0),
            Segment(TokenRole.ENV_OUTPUT, (6,) * 5, None, 0),
        ),
        reward=reward,
        stop_reason=StopReason.FAILED if failed else StopReason.SUBMITTED,
        failure=Failure("step", "SandboxError", "gone") if failed else None,
        stats=stats,
    )


def test_rollout_metrics_leave_rows_without_a_reward_out_of_the_mean() -> None:
    group = TrajectoryGroup(
        "a",
        (
            rollout(1.0, num_turns=2, invalid_calls=1),
            rollout(0.0, index=1, num_turns=4),
            rollout(None, failed=True, index=2),
        ),
    )
    equal = TrajectoryGroup("a", (rollout(0.5, num_turns=2), rollout(0.5, index=1, num_turns=2)))
    metrics = rollout_metrics([group, equal])
    assert metrics["reward"] == 0.5  # (1 + 0 + 0.5 + 0.5) / 4
    assert metrics["solved"] == 0.25
    assert (metrics["rollouts"], metrics["no_reward"], metrics["failed"]) == (5, 1, 1)
    assert metrics["groups_with_signal"] == 1
    assert metrics["num_turns"] == 2.0
    assert metrics["invalid_calls"] == 0.2
    assert metrics["stop_reason/failed"] == 0.2


def test_time_metrics() -> None:
    groups = [
        TrajectoryGroup("a", (rollout(1.0, sample_seconds=6.0, env_seconds=1.0, reset_seconds=0.5, score_seconds=0.5),))
    ]
    metrics = time_metrics(groups, rollout_seconds=4.0, train_seconds=1.0)
    assert metrics["sampling_share"] == 0.75
    assert metrics["sandbox_share"] == 0.25
    assert metrics["tokens_per_second"] == 2.0  # 10 tokens in 5 s
    assert metrics["action_tokens_per_second"] == 0.75  # 3 tokens in 4 s of rollouts


# ---------------------------------------------------------------- an evaluation


class ScriptedEngine:
    """Says what it is told to, and gives every token the probability 1/2."""

    policy_version = 7

    def __init__(self, sampler: ScriptedSampler) -> None:
        self._sampler = sampler

    def sampler(self, params: SamplingParams) -> ScriptedSampler:
        return self._sampler

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        raise NotImplementedError

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        return [[-math.log(2.0)] * len(trajectory) for trajectory in trajectories]


class GuessEnv:
    """Answers every command with its name, and rewards the answer that is the task's instruction."""

    tools = (BASH, SUBMIT)

    def __init__(self, task: Task) -> None:
        self.task, self.answer = task, ""

    async def reset(self) -> tuple[Message, ...]:
        return (Message("user", (Part(self.task.instruction, TokenRole.CONTEXT),)),)

    async def step(self, call: ToolCall) -> Step:
        if call.tool == "submit":
            self.answer = call.arguments["answer"]
            return Step((), done=True, submitted=True)
        return Step((Message("tool", (Part(call.arguments["command"], TokenRole.ENV_OUTPUT),), "bash"),))

    async def score(self) -> float:
        if self.task.instruction == "broken":
            raise VerifierError("no reward file")
        return float(self.answer == self.task.instruction)


@asynccontextmanager
async def open_guess(task: Task) -> AsyncIterator[GuessEnv]:
    yield GuessEnv(task)


async def test_an_evaluation_in_numbers() -> None:
    renderer = Renderer(tiny_tokenizer(), (BASH, SUBMIT))

    def encode(text: str) -> tuple[int, ...]:
        tool, value = text.split(" ", 1)
        return renderer.encode_action(ToolCall(tool, {"command" if tool == "bash" else "answer": value}))

    def replies(key: str) -> list[str]:  # .../0 answers 4 after a look, the others 5 at once
        return ["bash ls -la", "submit 4"] if key.endswith("/0") else ["submit 5"]

    tasks = [Task(id=name, instruction=text) for name, text in (("a", "4"), ("b", "5"), ("c", "6"), ("d", "broken"))]
    recorded = [rollout(1.0), rollout(0.0, index=1)]
    evaluation, groups = await evaluate(
        ScriptedEngine(ScriptedSampler(replies, encode)),  # type: ignore[arg-type]
        tasks,
        open_guess,
        renderer,
        limits=RolloutLimits(max_turns=4, max_tokens=500),
        params=SamplingParams(),
        samples_per_task=2,
        recorded=recorded,
        step=7,
    )
    assert [[t.reward for t in group] for group in groups] == [[1, 0], [0, 1], [0, 0], [None, None]]
    assert evaluation.pass_at_1 and evaluation.pass_at_1.value == pytest.approx(1 / 3)  # (1/2 + 1/2 + 0) / 3
    assert evaluation.pass_at_k and evaluation.pass_at_k.value == pytest.approx(2 / 3)
    assert evaluation.no_reward == 2
    assert evaluation.stop_reasons == {"submitted": 6, "failed": 2}
    assert evaluation.env_ce_own and evaluation.env_ce_own.value == pytest.approx(math.log(2.0))
    assert evaluation.env_ce_recorded and evaluation.env_ce_recorded.value == pytest.approx(math.log(2.0))
    said = len(renderer.tokenizer.backend_tokenizer.encode("ls -la").ids)
    assert [t.env_tokens for t in evaluation.tasks] == [said] * 4  # what the world said before it broke counts too
    assert evaluation.recorded[0].env_tokens == 10
    assert evaluation.per_rollout["num_turns"] == 1.5
    assert json.loads(json.dumps(evaluation.to_dict()))["step"] == 7
