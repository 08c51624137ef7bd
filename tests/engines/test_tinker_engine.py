"""The Tinker engine on a service within this process: the embedded engine's steps, and nothing half done is counted."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backtalk.cli.check import open_trainer
from backtalk.engines.choose import engine_config_class, open_engine
from backtalk.engines.conformance import Outcome, conformance
from backtalk.engines.foundry.config import FoundryConfig
from backtalk.engines.remote.config import Reduction
from backtalk.engines.remote.engine import RemoteEngine
from backtalk.engines.remote.local import LocalModel, LocalService
from backtalk.engines.remote.reduction import probe
from backtalk.engines.remote.service import AdamStep, Datum, LossName, ServiceError
from backtalk.engines.tinker.config import TinkerConfig
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.errors import ConfigError, DataError, SamplerFault
from backtalk.objective.config import ObjectiveConfig, PolicyOptions, WorldOptions
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.sampler import SamplingParams
from backtalk.settings import from_plain
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
BOTH = ObjectiveConfig(world_model_coeff=0.3)
REDUCTIONS: tuple[Reduction, ...] = ("sum", "row_mean")


def make_samples(
    rewards: Sequence[float | None] = (1.0, 0.0, 0.5, None), config: ObjectiveConfig = BOTH
) -> list[Sample]:
    """One group; the rows differ in length, the last one broke, and one has no observation."""
    rows = []
    for i, reward in enumerate(rewards):
        ids = [7 + (37 * i + 11 * k) % 390 for k in range(24)]
        segments = [Segment(CONTEXT, tuple(ids[:4])), Segment(ACTION, tuple(ids[4 : 8 + i]), (-6.1,) * (4 + i), turn=0)]
        if i != 1:
            segments += [Segment(TEMPLATE, tuple(ids[12:13]), turn=0), Segment(ENV_OUTPUT, tuple(ids[13:]), turn=0)]
        failure = Failure("step", "SandboxError", "broke") if reward is None else None
        stop = StopReason.FAILED if failure else StopReason.SUBMITTED
        rows.append(
            Trajectory(
                task_id="t",
                sample_index=i,
                segments=tuple(segments),
                reward=reward,
                failure=failure,
                stop_reason=stop,
            )
        )
    return build_samples(TrajectoryGroup("t", tuple(rows)), config)


def make_engine(service: Any, **settings: Any) -> RemoteEngine:
    return RemoteEngine(TinkerConfig(model=str(service.folder), **settings), lambda: service)


def scores(engine: RemoteEngine | TorchEngine) -> list[float]:
    row = Trajectory(task_id="t", sample_index=0, segments=(Segment(CONTEXT, tuple(range(20, 40))),))
    return asyncio.run(engine.score([row]))[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_three_steps_are_those_of_the_embedded_engine(model_dir: Path, reduction: Reduction) -> None:
    config = replace(
        BOTH, clip=(0.1, 0.1), policy=PolicyOptions(loss="cispo"), world=WorldOptions(weights={"env_output": 0.5})
    )
    torch_engine = TorchEngine(TorchConfig(model=str(model_dir), device="cpu", dtype="float32", learning_rate=1e-3))
    ours = make_engine(LocalService(model_dir, reduction, max_rows=3), reduction=reduction, learning_rate=1e-3)
    for _ in range(3):
        expected = asyncio.run(torch_engine.train_step(make_samples(config=config), config))
        metrics = asyncio.run(ours.train_step(make_samples(config=config), config))
        same = expected.keys() & metrics.keys() - {name for name in expected if "_grad_norm" in name}
        assert {"policy_loss", "target_ce", "world_pull_share", "grad_norm", "learning_rate"} <= same
        for name in same - {"grad_norm_ratio", "world_grad_share", "grad_cosine"}:
            assert metrics[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-6, nan_ok=True), name
    assert ours.policy_version == 3
    before = scores(make_engine(LocalService(model_dir, "sum")))
    moved = max(abs(a - b) for a, b in zip(scores(torch_engine), before, strict=True))
    assert scores(ours) == pytest.approx(scores(torch_engine), abs=0.002 * moved)


def test_the_conformance_suite_passes_under_both_reductions() -> None:
    results = list(conformance(open_trainer("tinker")))
    assert [r.check.name for r in results if r.outcome is not Outcome.PASSED] == ["processes_change_nothing"]


class MeanOverTokens(LocalModel):
    """A model of a service that takes the mean over all weights of a request, which is neither reduction."""

    def run(self, data: Sequence[Datum], loss: LossName, *, backward: bool) -> list[list[float]]:
        total = sum(abs(w) for row in data for w in row.inputs.get("weights", ())) or 1.0
        scaled = [
            Datum(token_ids=r.token_ids, inputs={"weights": [w / total for w in r.inputs["weights"]]}) for r in data
        ]
        return super().run(scaled, loss, backward=backward)


class NoNegativeWeights(LocalModel):
    """A model of a service that takes negative weights for 0."""

    def run(self, data: Sequence[Datum], loss: LossName, *, backward: bool) -> list[list[float]]:
        clamped = [
            Datum(token_ids=r.token_ids, inputs={"weights": [max(w, 0.0) for w in r.inputs["weights"]]}) for r in data
        ]
        return super().run(clamped, loss, backward=backward)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reduction_is_measured(model_dir: Path, reduction: Reduction) -> None:
    assert probe(LocalService(model_dir, reduction).open_model(), range(20, 36)) == reduction


def test_an_unknown_reduction_is_refused_and_so_is_a_model_that_does_not_move(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"gives (0\.9|1\.0)\d of .* row (0\.9|1\.0)\d, two requests 2\.0"):
        probe(MeanOverTokens(LocalService(model_dir, "sum")), range(20, 36))
    with pytest.raises(ConfigError, match=r"-1/2 made (-0\.00|0\.00) of .* its cross_entropy does not carry"):
        probe(NoNegativeWeights(LocalService(model_dir, "sum")), range(20, 36))
    frozen = LocalService(model_dir, "sum").open_model()
    frozen.step = lambda adam: {}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="the service's model does not move"):
        probe(frozen, range(20, 36))


def test_the_first_step_measures_the_reduction_in_a_session_of_its_own(model_dir: Path) -> None:
    sessions: list[LocalService] = []

    def connect() -> LocalService:
        sessions.append(LocalService(model_dir, "row_mean"))
        return sessions[-1]

    engine = RemoteEngine(TinkerConfig(model=str(model_dir), learning_rate=0.0), connect)
    for _ in range(2):
        asyncio.run(engine.train_step(make_samples(), BOTH))
    assert [(len(s.models), s.is_closed) for s in sessions] == [(1, False), (1, True)]


class Broken(LocalService):
    """A service that fails at one call."""

    def __init__(self, folder: Path, at: str) -> None:
        super().__init__(folder, "sum")
        self.at = at

    def open_model(self, state: str | None = None) -> LocalModel:
        model = super().open_model(state)

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise ServiceError("the server is gone")

        if self.at == "step":
            model.step = fail  # type: ignore[method-assign]
        elif self.at == "backward":
            run = model.run
            model.run = lambda data, loss, *, backward: (fail if backward else run)(data, loss, backward=backward)
        return model


@pytest.mark.parametrize("at", ["backward", "step"])
def test_a_step_that_stops_half_way_is_not_counted_and_a_saved_state_goes_on(
    model_dir: Path, tmp_path: Path, at: str
) -> None:
    service = Broken(model_dir, "nowhere")
    engine = make_engine(service, reduction="sum", learning_rate=1e-3)
    asyncio.run(engine.train_step(make_samples(), BOTH))
    engine.save(tmp_path / "one")
    saved = scores(engine)

    service.at = at
    engine.load(tmp_path / "one")
    with pytest.raises(ServiceError, match="the server is gone"):
        asyncio.run(engine.train_step(make_samples(), BOTH))
    assert engine.policy_version == 1
    for action in (lambda: asyncio.run(engine.train_step(make_samples(), BOTH)), lambda: engine.save(tmp_path / "two")):
        with pytest.raises(ServiceError, match=r"step 1 stopped half way.*--resume"):
            action()

    service.at = "nowhere"
    engine.load(tmp_path / "one")
    assert (engine.policy_version, scores(engine)) == (1, saved)
    other = make_engine(service, reduction="sum", learning_rate=1e-3)
    other.load(tmp_path / "one")
    results = [asyncio.run(e.train_step(make_samples(), BOTH)) for e in (engine, other)]
    results = [{name: x for name, x in one.items() if name != "service_prefill_tokens"} for one in results]
    assert results[0] == pytest.approx(results[1], nan_ok=True)
    assert engine.policy_version == other.policy_version == 2 and scores(engine) == scores(other)


def test_a_checkpoint_of_something_else_is_refused(model_dir: Path, tmp_path: Path) -> None:
    engine = make_engine(LocalService(model_dir, "sum"))
    with pytest.raises(DataError, match=r"holds no checkpoint of engine\.kind=tinker"):
        engine.load(tmp_path)
    engine.save(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["path"].startswith("local/backtalk-000000-")
    with pytest.raises(DataError, match="'lora_rank': 8"):
        make_engine(LocalService(model_dir, "sum"), lora_rank=8).load(tmp_path)
    with pytest.raises(ServiceError, match="no state was saved at"):
        make_engine(LocalService(model_dir, "sum")).load(tmp_path)


async def test_actions_are_the_policys_own_and_the_service_is_paid(model_dir: Path) -> None:
    prices = {"prefill_price": 1.0, "sample_price": 2.0, "train_price": 3.0}
    # The rows that are trained below are not the sampled ones.
    engine = make_engine(LocalService(model_dir, "sum"), reduction="sum", max_logprob_gap=math.inf, **prices)
    sampler = engine.sampler(SamplingParams(max_tokens=6, seed=5))
    found = []
    for key in ("a", "a", "b"):
        async with sampler.session(key) as session:
            found.append([await session.sample(list(range(20, 30)), limit) for limit in (None, 2)])
    assert found[0] == found[1] != found[2]
    first, second = found[0]
    assert len(second.token_ids) == 2 and second.token_ids != first.token_ids[:2] and first.logprobs is not None
    assert 2 < len(first.token_ids) <= 6 and first.stopped == (first.token_ids[-1] in sampler.stop_token_ids)
    sampled = sum(len(one.token_ids) for both in found for one in both)
    row = Trajectory(task_id="t", sample_index=0, segments=(Segment(CONTEXT, (*range(20, 30), *first.token_ids)),))
    assert (await engine.score([row]))[0][10:] == pytest.approx(first.logprobs, abs=1e-5)
    metrics = await engine.train_step(make_samples(), BOTH)
    tokens = sum(len(sample) for sample in make_samples())
    prefill = 6 * 10 + len(row.token_ids) + tokens  # six prompts, the scored row, and the step's own forward pass
    usage = {name: metrics[f"service_{name}_tokens"] for name in ("prefill", "sampled", "trained")}
    assert usage == {"prefill": prefill, "sampled": sampled, "trained": tokens}
    assert metrics["service_cost"] == pytest.approx((prefill + 2 * sampled + 3 * tokens) / 1e6)
    assert (await engine.train_step(make_samples(), BOTH))["service_sampled_tokens"] == 0


@pytest.mark.parametrize("error", [0.04, 0.06])
async def test_other_log_probabilities_than_were_sampled_make_no_update(model_dir: Path, error: float) -> None:
    """0.05 nats a token is allowed on average."""
    engine = make_engine(LocalService(model_dir, "sum"), reduction="sum", learning_rate=1e-3)
    prompt, rows = tuple(range(20, 30)), []
    sampler = engine.sampler(SamplingParams(max_tokens=6, seed=5))
    for i in range(2):
        async with sampler.session(str(i)) as session:
            action = await session.sample(list(prompt))
        said = tuple(x + error for x in action.logprobs or ())
        segments = (Segment(CONTEXT, prompt), Segment(ACTION, action.token_ids, said, turn=0))
        rows.append(Trajectory(task_id="t", sample_index=i, segments=segments, reward=float(i)))
    samples, before = build_samples(TrajectoryGroup("t", tuple(rows)), BOTH), (await engine.score(rows))[0]
    if error < 0.05:
        await engine.train_step(samples, BOTH)
        return
    with pytest.raises(SamplerFault, match=r"by 0\.06 nats a token.*No update was made.*engine\.max_logprob_gap"):
        await engine.train_step(samples, BOTH)
    assert engine.policy_version == 0 and (await engine.score(rows))[0] == before


def test_a_step_of_equal_rewards_moves_in_proportion_to_the_coefficient(model_dir: Path) -> None:
    rates = []
    for coefficient in (0.1, 0.2):
        config = replace(BOTH, world_model_coeff=coefficient)
        engine = make_engine(LocalService(model_dir, "row_mean"), reduction="row_mean", learning_rate=1e-3)
        rates.append(asyncio.run(engine.train_step(make_samples((1.0, 1.0, 1.0, None), config), config)))
    assert [m["update_scale"] for m in rates] == pytest.approx([0.1, 0.2])
    assert [m["learning_rate"] for m in rates] == pytest.approx([1e-4, 2e-4])


def test_a_step_without_any_gradient_is_skipped(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(LocalService(model_dir, "sum"), reduction="sum")
    with caplog.at_level(logging.WARNING):
        metrics = asyncio.run(engine.train_step(make_samples((1.0, 1.0)), replace(BOTH, world_model_coeff=0.0)))
    assert metrics["skipped"] == 1.0 and math.isnan(metrics["service_cost"]) and engine.policy_version == 1
    assert "step 1 changed nothing" in caplog.text


@pytest.mark.parametrize(
    ("config", "temperature", "words"),
    [
        (ObjectiveConfig(policy=PolicyOptions(kl_coeff=0.1)), 1.0, "use kl_coeff=0"),
        (ObjectiveConfig(), 0.7, r"sampled at 0\.7.*use temperature=1\.0"),
    ],
)
def test_what_the_service_cannot_keep_is_refused(
    model_dir: Path, config: ObjectiveConfig, temperature: float, words: str
) -> None:
    samples = [replace(sample, temperature=temperature) for sample in make_samples(config=config)]
    with pytest.raises(ConfigError, match=words):
        asyncio.run(make_engine(LocalService(model_dir, "sum")).train_step(samples, config))


@pytest.mark.parametrize(
    ("kind", "config_class", "address", "package"),
    [
        ("tinker", TinkerConfig, "base_url", "tinker"),
        ("foundry", FoundryConfig, "endpoint", "azure.ai.finetuningsessions"),
    ],
)
def test_settings_are_read_without_the_sdk_which_is_asked_for_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, kind: str, config_class: type[Any], address: str, package: str
) -> None:
    assert engine_config_class(kind) is config_class
    config = from_plain(config_class, {"kind": kind, "model": "m", address: "http://127.0.0.1:1"})
    with pytest.raises(ConfigError, match=f"{address}='nowhere' is no address"):
        config_class(**{address: "nowhere"})
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"backtalk.engines.{kind}.sdk", raising=False)  # another test may have loaded it
    monkeypatch.delattr(f"backtalk.engines.{kind}.sdk", raising=False)
    with pytest.raises(ConfigError, match=rf"pip install 'backtalk\[{kind}\]'"):
        open_engine(config)


def test_the_local_service_takes_the_steps_of_adamw(model_dir: Path) -> None:
    """One number by hand: with both betas 0 and a large eps, a step is lr / eps times the gradient."""
    model = LocalService(model_dir, "sum").open_model()
    before = model.network.model.norm.weight.detach().clone()
    model.run([Datum(token_ids=range(20, 30), inputs={"weights": [1.0] * 9})], "cross_entropy", backward=True)
    model.step(AdamStep(learning_rate=100.0, betas=(0.0, 0.0), eps=1e4))
    moved = model.network.model.norm.weight.detach() - before
    torch.testing.assert_close(moved, -0.01 * model.gradients["model.norm.weight"], rtol=1e-2, atol=1e-5)
