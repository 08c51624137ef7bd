"""Rollouts that share few places with a real sampler, which waits for every open session: nobody waits in a circle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.sampler import TorchSampler
from backtalk.envs.base import Env, Step
from backtalk.errors import SandboxError
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.rollout import admission as admission_module
from backtalk.rollout.admission import Admission
from backtalk.rollout.groups import EnvFactory, run_groups
from backtalk.rollout.limits import Deadline, RolloutLimits
from backtalk.rollout.sampler import ContinuousSampler, SamplingParams
from backtalk.sandboxes import SandboxLimits
from backtalk.sandboxes import pool as pool_module
from backtalk.sandboxes.base import arrival
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole, TrajectoryGroup
from sandbox_help import CountingBackend
from tiny import tiny_model_dir

TURNS = 3
LIMITS = RolloutLimits(max_turns=TURNS, max_tokens_per_turn=4, rollout_timeout_s=3600, max_retries=0, concurrency=8)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    model = tiny_model_dir(tmp_path_factory.mktemp("model"))
    return TorchEngine(TorchConfig(model=str(model), device="cpu"))


@dataclass
class Talk:
    """An environment without a sandbox: it answers whatever is said."""

    tools: tuple[ToolSpec, ...] = ()

    async def reset(self) -> tuple[Message, ...]:
        return (Message("user", (Part("Begin", TokenRole.CONTEXT),)),)

    async def step(self, call: ToolCall) -> Step:
        return Step((Message("tool", (Part("yes", TokenRole.ENV_OUTPUT),)),))

    async def score(self) -> float | None:
        return 1.0


async def play(engine: TorchEngine, open_env: EnvFactory, group_size: int = 8) -> tuple[TrajectoryGroup, TorchSampler]:
    """Run one group at the real sampler. A circle of waiting ends in a TimeoutError here, and never by itself."""
    sampler = engine.sampler(SamplingParams(max_tokens=4))
    assert isinstance(sampler, TorchSampler)
    renderer, task = Renderer(engine.tokenizer, ()), Task(id="t", instruction="")
    async with asyncio.timeout(120):
        (group,) = await run_groups([task], open_env, sampler, renderer, LIMITS, group_size=group_size, key="k")
    return group, sampler


def all_played(group: TrajectoryGroup) -> bool:
    return [(t.stop_reason, t.num_turns, t.reward) for t in group] == [(StopReason.MAX_TURNS, TURNS, 1.0)] * len(group)


def in_sandboxes_of(pool: PooledBackend) -> EnvFactory:
    @asynccontextmanager
    async def opened(task: Task) -> AsyncIterator[Env]:
        async with pool.open(SandboxLimits()):
            yield Talk()

    return opened


@pytest.mark.parametrize("places", [1, 3])
async def test_fewer_sandboxes_than_rollouts(engine: TorchEngine, places: int) -> None:
    backend = CountingBackend()
    pool = PooledBackend(backend, live=places)
    group, _ = await play(engine, in_sandboxes_of(pool))
    assert all_played(group) and backend.most_live == places


async def test_memory_that_is_short_all_the_time(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "memory_is_short", lambda limits: True)
    monkeypatch.setattr(pool_module, "_MEMORY_PAUSE_S", 0.001)
    backend = CountingBackend()
    pool = PooledBackend(backend, live=8)
    group, _ = await play(engine, in_sandboxes_of(pool))
    assert all_played(group) and backend.most_live == 1


@pytest.mark.parametrize("places", [1, 3])
async def test_a_continuous_sampler_waits_for_none_of_them(tmp_path: Path, places: int) -> None:
    engine = TorchEngine(TorchConfig(model=str(tiny_model_dir(tmp_path)), device="cpu", batching="continuous"))
    sampler = engine.sampler(SamplingParams(max_tokens=4))
    assert isinstance(sampler, ContinuousSampler)
    renderer, task = Renderer(engine.tokenizer, ()), Task(id="t", instruction="")
    open_env = in_sandboxes_of(PooledBackend(CountingBackend(), live=places))
    async with asyncio.timeout(120):
        (group,) = await run_groups([task], open_env, sampler, renderer, LIMITS, group_size=8, key="k")
    assert all_played(group)
    scores = await engine.score(group.trajectories)
    for trajectory, logprobs in zip(group, scores, strict=True):
        position = 0
        for segment in trajectory.segments:
            if segment.logprobs is not None:
                own = logprobs[position : position + len(segment.token_ids)]
                assert own == pytest.approx(segment.logprobs, abs=1e-4)
            position += len(segment.token_ids)


@dataclass
class Server:
    """A world with places of its own, which says that a rollout waits, or does not."""

    says_so: bool
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Env]:
        if self.says_so and self.places.locked():
            arrival.get().wait()
        async with self.places:
            arrival.get().go_on()
            yield Talk()


@pytest.mark.parametrize("says_so", [True, False])
async def test_a_world_with_places_of_its_own(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, says_so: bool
) -> None:
    """One that says nothing is waited for, but not for ever; one that says so is not waited for at all."""
    monkeypatch.setattr(admission_module, "PATIENCE_S", 3600.0 if says_so else 0.05)
    group, _ = await play(engine, Server(says_so).open)
    assert all_played(group)


@pytest.mark.parametrize(
    "pause_s", [lambda number: 0.0, lambda number: 0.01 * number, lambda number: 0.2 * (number == 3)]
)
async def test_with_a_place_for_each_they_sample_together(engine: TorchEngine, pause_s: Callable[[int], float]) -> None:
    """However long each takes to open: which rollouts share a wave depends on the rollouts alone."""
    opened_so_far = iter(range(100))

    @asynccontextmanager
    async def opened(task: Task) -> AsyncIterator[Env]:
        await asyncio.sleep(pause_s(next(opened_so_far)))
        yield Talk()

    group, sampler = await play(engine, opened)
    assert all_played(group)
    assert (sampler.stats.waves, sampler.stats.calls) == (TURNS, 8 * TURNS)


async def test_one_that_fails_to_open_is_not_waited_for(engine: TorchEngine) -> None:
    def breaks(number: int) -> None:
        if number == 5:
            raise SandboxError("no room")

    pool = PooledBackend(CountingBackend(breaks), live=8)
    group, sampler = await play(engine, in_sandboxes_of(pool))
    assert sorted(t.num_turns for t in group) == [0, *[TURNS] * 7]
    assert sampler.stats.waves == TURNS


async def test_waiting_for_a_place_is_not_the_rollouts_time_while_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    admission, deadline = Admission(), Deadline(10.0)
    with admission.opening(deadline):
        now += 1  # its own second
        arrival.get().wait()
        now += 4
        assert deadline.left_s == 5  # nobody has ended, so its time runs
        admission.rollout_ended()
        assert (deadline.left_s, deadline.elapsed_s) == (9, 1)
        now += 30
        admission.rollout_ended()
        assert deadline.left_s == 9
        now += 2
        arrival.get().go_on()
        assert deadline.left_s == 9
        now += 3
        admission.rollout_ended()
        assert deadline.left_s == 6  # it has its place: a second before, three after
    admission.rollout_ended()
    assert deadline.left_s == 6


async def test_who_is_opening_is_waited_for_and_who_waits_for_a_place_is_not() -> None:
    admission = Admission()

    def may_sample() -> bool:
        """Whether a rollout that asks now may sample at once."""
        asking = admission.wait_for_openings()
        try:
            asking.send(None)
        except StopIteration:
            return True
        asking.close()
        return False

    assert may_sample()
    with admission.opening(Deadline(10)):
        assert not may_sample()
        arrival.get().wait()
        assert may_sample()
        with admission.opening(Deadline(10)):
            assert not may_sample()
        assert may_sample()
        arrival.get().go_on()
        assert not may_sample()
    assert may_sample()
    arrival.get().wait()  # nobody arrives: told in vain
    assert may_sample()
