"""Estimates against numbers worked out by hand, and an evaluation of a scripted policy end to end."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
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
from backtalk.run.evaluate import (
    difference_interval,
    evaluate,
    pass_at_k,
    ratio_interval,
    rollout_metrics,
    time_metrics,
)
from backtalk.tasks.task import Task
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_tokenizer

# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 0, 1, 0.0),
        (4, 4, 4, 1.0),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (5, 2, 3, 9 / 10),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (10, 3, 8, 1.0),  # only 7 attempts failed, so any 8 hold a solved one
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_solved_attempt() -> None:
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 0 <= solved"):
        pass_at_k(n, c, k)


def test_an_interval_covers_as_often_as_it_says() -> None:
    """200 samples of 40 from a known distribution: 95 % intervals miss the mean about 5 % of the time."""
    draw = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        interval = ratio_interval([(float(x), 1.0) for x in draw.exponential(size=40)], seed=seed)
        assert interval and interval.low is not None and interval.high is not None
        inside += interval.low <= 1.0 <= interval.high
    assert 0.88 <= inside / 200 <= 0.98


def test_a_ratio_weighs_tasks_by_their_tokens() -> None:
    interval = ratio_interval([(10.0, 10.0), (90.0, 30.0)])
    assert interval is not None
    assert interval.value == 2.5  # 100 / 40, not the mean of 1 and 3
    assert interval.low == 1.0 and interval.high == 3.0


def test_too_little_has_no_interval() -> None:
    assert ratio_interval([]) is None
    assert ratio_interval([(0.0, 0.0), (0.0, 0.0)]) is None
    single = ratio_interval([(3.0, 2.0)])
    assert single and (single.value, single.low, single.high) == (1.5, None, None)


def test_a_paired_difference_is_narrower_than_the_two_apart() -> None:
    draw = np.random.default_rng(0)
    before = draw.normal(5.0, 2.0, size=50)
    rows = [(b - 0.5 + e, 1.0, b, 1.0) for b, e in zip(before, draw.normal(0, 0.1, size=50), strict=True)]
    paired = difference_interval(rows)
    alone = ratio_interval([(b, 1.0) for b in before])
    assert paired and alone and paired.low is not None and paired.high is not None
    assert alone.low is not None and alone.high is not None
    assert paired.low < -0.5 < paired.high < -0.4
    assert paired.high - paired.low < (alone.high - alone.low) / 5


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
    assert metrics["stop_failed"] == 0.2


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
        ScriptedEngine(ScriptedSampler(replies, encode)),
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
