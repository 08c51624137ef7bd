"""The embedded engine with a server as its sampler, over HTTP: in sync, and broken in the ways that servers break."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from backtalk.engines.server.config import ServerConfig
from backtalk.engines.server.process import VllmProcess
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.envs.base import Env, Step
from backtalk.errors import ConfigError, InfrastructureError, SamplerFault
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.groups import run_groups
from backtalk.rollout.limits import RolloutLimits
from backtalk.rollout.sampler import SamplingParams
from backtalk.run.config import load_config, setting_schemas
from backtalk.run.rollouts import check_rollouts
from backtalk.tasks.task import Task
from backtalk.trajectory import TokenRole, TrajectoryGroup
from sampling_server import Breakable, Proxy, listening, sampling_server
from tiny import tiny_model_dir

ON_VLLM = "BACKTALK_VLLM" in os.environ
HIDDEN = 256 if ON_VLLM else 64  # vLLM has no attention of 16 numbers a head
BOTH = ObjectiveConfig(world_model_coeff=0.3)
LIMITS = RolloutLimits(max_turns=2, max_tokens_per_turn=6, rollout_timeout_s=3600, max_retries=0, concurrency=4)
UPDATE = """
import json, sys, urllib.request
body = json.dumps({"model_path": sys.argv[2]}).encode()
urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/update_weights_from_disk", body))
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny", hidden_size=HIDDEN)


@pytest.fixture(scope="module")
def running(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breakable]:
    """Our own server, or under `scripts/vllm test` a proxy before vLLM."""
    if not ON_VLLM:
        with sampling_server(model_dir) as server:
            yield server
        return
    log = tmp_path_factory.mktemp("vllm") / "log"
    config = ServerConfig(python=os.environ["BACKTALK_VLLM"], arguments=("--enforce-eager",))
    process = VllmProcess(config, str(model_dir), "float32", "cpu", log)
    process.wait(1800)
    proxy = Proxy(upstream=process.base_url)
    with listening(proxy):
        yield proxy
    process.end()


@pytest.fixture
def server(running: Breakable) -> Breakable:
    running.mend()
    return running


def engine_at(server: Breakable, model_dir: Path, *, rate: float = 1e-3, rank: int = 0, **changes: Any) -> TorchEngine:
    sampler = ServerConfig(**{"base_url": server.url, "attempts": 2, "retry_wait_s": 0.01, **changes})
    config = TorchConfig(
        model=str(model_dir), sampler=sampler, device="cpu", dtype="float32", learning_rate=rate, lora_rank=rank
    )
    return TorchEngine(config)


@dataclass
class Talk:
    """An environment without a sandbox: it answers whatever is said."""

    reward: float
    tools: tuple[ToolSpec, ...] = ()

    async def reset(self) -> tuple[Message, ...]:
        return (Message("user", (Part("Begin", TokenRole.CONTEXT),)),)

    async def step(self, call: ToolCall) -> Step:
        return Step((Message("tool", (Part("yes", TokenRole.ENV_OUTPUT),)),))

    async def score(self) -> float | None:
        return self.reward


async def play(engine: TorchEngine, temperature: float = 1.0) -> list[TrajectoryGroup]:
    rewards = itertools.cycle([0.0, 1.0])

    @asynccontextmanager
    async def opened(task: Task) -> AsyncIterator[Env]:
        yield Talk(next(rewards))

    sampler = engine.sampler(SamplingParams(temperature=temperature, max_tokens=6, seed=1))
    renderer, task = Renderer(engine.tokenizer, ()), Task(id="t", instruction="")
    async with asyncio.timeout(120):
        return await run_groups([task], opened, sampler, renderer, LIMITS, group_size=4, key="k")


def samples_of(groups: list[TrajectoryGroup], temperature: float = 1.0) -> list[Sample]:
    return [sample for group in groups for sample in build_samples(group, BOTH, temperature=temperature)]


def weights(engine: TorchEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()])


# ---------------------------------------------------------------- in sync


@pytest.mark.parametrize("kind", ["vllm"] if ON_VLLM else ["vllm", "sglang"])
async def test_what_is_sampled_is_the_trained_policys_at_every_version(
    server: Breakable, model_dir: Path, kind: str
) -> None:
    engine = engine_at(server, model_dir, kind=kind)
    for version in range(3):
        groups = await play(engine)
        scores = await engine.score(list(groups[0]))
        for trajectory, row in zip(groups[0], scores, strict=True):
            assert trajectory.policy_version == version
            position = 0
            for segment in trajectory.segments:
                if segment.role is TokenRole.ACTION:
                    assert segment.logprobs == pytest.approx(row[position : position + len(segment)], abs=1e-4)
                position += len(segment)
        metrics = await engine.train_step(samples_of(groups), BOTH)
        assert metrics["sampler_logprob_gap"] < 1e-4 and metrics["sync_gap"] < 1e-4
        assert version == 0 or metrics["sync_uptake"] == pytest.approx(1, abs=0.02)
    assert len(server.updates) == 3
    assert not any(Path(folder).exists() for folder in server.updates)
    asked = server.asked[-1]
    assert asked["seed"] >= 0 and (asked["top_p"], asked["top_k"], asked["repetition_penalty"]) == (1, -1, 1)


async def test_adapters_are_handed_over_merged(server: Breakable, model_dir: Path) -> None:
    pytest.importorskip("peft")
    engine = engine_at(server, model_dir, rank=2, rate=1e-2)
    await engine.train_step(samples_of(await play(engine)), BOTH)
    metrics = await engine.train_step(samples_of(await play(engine)), BOTH)
    assert metrics["sampler_logprob_gap"] < 1e-4 and metrics["sync_uptake"] == pytest.approx(1, abs=0.02)


@pytest.mark.skipif(ON_VLLM, reason="the command is for our own server")
async def test_a_command_hands_over_the_weights(server: Breakable, model_dir: Path) -> None:
    root = server.url.removesuffix("/v1")
    engine = engine_at(server, model_dir, kind="command", update_command=(sys.executable, "-c", UPDATE, root))
    await play(engine)
    assert len(server.updates) == 1
    failing = engine_at(server, model_dir, kind="command", update_command=(sys.executable, "-c", "exit('no disk')"))
    with pytest.raises(SamplerFault, match=r"update_command ended with status 1: no disk; it has to load the folder"):
        await play(failing)


async def test_a_temperature_is_that_of_the_log_probabilities(server: Breakable, model_dir: Path) -> None:
    engine = engine_at(server, model_dir)
    metrics = await engine.train_step(samples_of(await play(engine, 0.5), 0.5), BOTH)
    assert metrics["sampler_logprob_gap"] < 1e-4
    if ON_VLLM:  # which is started with log-probabilities of after it
        return
    server.raw = True  # type: ignore[attr-defined]
    with pytest.raises(SamplerFault, match=r"before the temperature 0\.5.*--logprobs-mode processed_logprobs"):
        await play(engine_at(server, model_dir), 0.5)


async def test_a_watched_action_is_the_beginning_of_the_whole_one(server: Breakable, model_dir: Path) -> None:
    sampler = engine_at(server, model_dir).sampler(SamplingParams(max_tokens=6))
    async with sampler.session("a") as session:
        whole = await session.sample([5, 6, 7])
    assert len(whole.token_ids) == 6 and not whole.stopped
    async with sampler.session("a") as session:
        seen: list[int] = []
        cut = await session.sample_watched([5, 6, 7], 6, lambda token: seen.append(token) or len(seen) == 3)  # type: ignore[attr-defined]
    assert tuple(seen) == cut.token_ids == whole.token_ids[:3] and cut.logprobs == whole.logprobs[:3]  # type: ignore[index]
    server.breaks_off = 1
    async with sampler.session("a") as session:
        assert await session.sample_watched([5, 6, 7], 6, lambda token: False) == whole  # type: ignore[attr-defined]


async def test_a_rollout_that_waits_for_its_command_holds_no_other(server: Breakable, model_dir: Path) -> None:
    """The command of the first rollout ends once the other has sampled all its turns: waves would wait for ever."""
    sampler, ends = engine_at(server, model_dir).sampler(SamplingParams(max_tokens=3)), asyncio.Event()

    async def first() -> None:
        async with sampler.session("first") as session:
            await session.sample([5, 6])
            await ends.wait()
            await session.sample([5, 6, 7])

    async def second() -> None:
        async with sampler.session("second") as session:
            for turn in range(3):
                await session.sample([8] * (turn + 1))
        ends.set()

    async with asyncio.timeout(120):
        await asyncio.gather(first(), second())


async def test_a_rollout_whose_environment_is_slow_to_open_holds_no_other(server: Breakable, model_dir: Path) -> None:
    """The first opens once the three others have been scored."""
    engine = engine_at(server, model_dir)
    number, may_open, scored = itertools.count(), asyncio.Event(), []

    class Slow(Talk):
        async def reset(self) -> tuple[Message, ...]:
            if self.reward == 0:
                await may_open.wait()
            return await super().reset()

        async def score(self) -> float | None:
            scored.append(self.reward)
            if len(scored) == 3:
                may_open.set()
            return self.reward

    @asynccontextmanager
    async def opened(task: Task) -> AsyncIterator[Env]:
        yield Slow(float(next(number)))

    sampler = engine.sampler(SamplingParams(max_tokens=6))
    renderer, task = Renderer(engine.tokenizer, ()), Task(id="t", instruction="")
    async with asyncio.timeout(120):
        await run_groups([task], opened, sampler, renderer, LIMITS, group_size=4, key="k")
    assert scored[-1] == 0.0 and sorted(scored[:3]) == [1.0, 2.0, 3.0]


# ---------------------------------------------------------------- broken


async def test_a_server_that_keeps_its_weights_is_found_after_the_smallest_step(
    server: Breakable, model_dir: Path
) -> None:
    engine = engine_at(server, model_dir, rate=1e-6)
    await engine.train_step(samples_of(await play(engine)), BOTH)
    server.frozen = True
    with pytest.raises(SamplerFault, match=r"out of sync.* went along with -?0%.*--resume"):
        await play(engine)


async def test_another_model_is_refused_before_any_rollout(server: Breakable, model_dir: Path) -> None:
    engine = engine_at(server, model_dir, rate=3e-2)
    await engine.train_step(samples_of(await play(engine)), BOTH)
    server.frozen = True
    fresh = engine_at(server, model_dir)
    with torch.no_grad():
        next(iter(fresh.model.parameters())).mul_(1.5)
    with pytest.raises(SamplerFault, match=r"other log-probabilities than the trainer's.*Is it the same model"):
        await play(fresh)


async def test_wrong_log_probabilities_make_no_update(server: Breakable, model_dir: Path) -> None:
    engine, other = engine_at(server, model_dir), engine_at(server, model_dir)
    good = samples_of(await play(engine))
    server.shift = 0.01
    bad = samples_of(await play(engine))
    before = weights(engine)
    with pytest.raises(SamplerFault, match=r"differ from the trainer's by 0\.01 nats.*No update was made.*--resume"):
        await engine.train_step(bad, BOTH)
    assert engine.policy_version == 0 and torch.equal(weights(engine), before)
    await engine.train_step(good, BOTH)
    await other.train_step(good, BOTH)
    assert torch.equal(weights(engine), weights(other))  # nothing of the refused step is left
    with pytest.raises(SamplerFault, match="says of what it samples other log-probabilities"):
        await play(engine_at(server, model_dir))


async def test_an_error_that_passes_is_waited_out_and_one_that_stays_costs_the_rollouts(
    server: Breakable, model_dir: Path
) -> None:
    engine = engine_at(server, model_dir)
    good = await play(engine)
    server.failures = 1
    assert [t.messages for t in (await play(engine))[0]] == [t.messages for t in good[0]]
    server.failures = 10**6
    groups = await play(engine)
    assert all(t.failure is not None and t.reward is None for t in groups[0])
    with pytest.raises(InfrastructureError, match=r"status 500.*a worker has died"):
        check_rollouts(groups, "step 0")


async def test_a_server_that_is_gone_ends_the_step(server: Breakable, model_dir: Path) -> None:
    engine = engine_at(server, model_dir)
    await play(engine)
    server.lives = 3
    with pytest.raises(SamplerFault, match=r"the sampler is gone.*not counted.*--resume"):
        await play(engine)
    with pytest.raises(SamplerFault, match=r"the sampler cannot be used.*did not answer.*--resume"):
        await play(engine_at(server, model_dir))


def test_a_vllm_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(SamplerFault, match=r"vLLM ended with status 1.*pip install vllm.*engine\.sampler\.python"):
        VllmProcess(ServerConfig(python="/bin/false"), "model", "float32", "cpu", tmp_path / "log").wait(30)
    with pytest.raises(ConfigError, match="python='/nowhere/python' cannot be run"):
        VllmProcess(ServerConfig(python="/nowhere/python"), "model", "float32", "cpu", tmp_path / "log")


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(("device", "added"), [("cpu", ["--no-enable-chunked-prefill"]), ("cuda", [])])
def test_prompts_are_not_chunked_on_a_cpu_unless_asked(tmp_path: Path, device: str, added: list[str]) -> None:
    config = ServerConfig(python="/bin/echo", arguments=("--enable-chunked-prefill",))
    server = VllmProcess(config, "model", "float32", device, tmp_path / "log")  # ends its process when it goes
    assert server.process.wait(30) == 0
    words = (tmp_path / "log").read_text().split()
    assert [word for word in words if "chunked" in word] == [*added, "--enable-chunked-prefill"]


def test_settings_name_a_sampler_or_describe_a_server() -> None:
    assert load_config("triage").engine.sampler == "torch"  # type: ignore[union-attr]
    assert load_config("triage", ["engine.sampler=vllm"]).engine.sampler == "vllm"  # type: ignore[union-attr]
    config = load_config("triage", ["engine.sampler.base_url=http://127.0.0.1:8000/v1", "engine.sampler.kind=sglang"])
    assert config.engine.sampler == ServerConfig(kind="sglang", base_url="http://127.0.0.1:8000/v1")  # type: ignore[union-attr]
    assert "engine.sampler" in setting_schemas()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.sampler=hf"], "engine.sampler='hf'"),
        (["engine.sampler.kind=sglang"], "start the server"),
        (["engine.sampler.kind=command", "engine.sampler.base_url=http://x/v1"], "update_command"),
        (["engine.sampler.base_url=localhost:8000"], "is no address"),
        (["engine.sampler.attempts=0"], "attempts=0 cannot work"),
    ],
)
def test_settings_that_cannot_work(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("triage", overrides)
