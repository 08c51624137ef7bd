"""The Foundry engine through its SDK: HTTP to a server that speaks the service's calls over a model with adapters."""

from __future__ import annotations

import asyncio
import math
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from backtalk.engines.conformance import Outcome, conformance
from backtalk.engines.foundry.config import FoundryConfig
from backtalk.engines.remote.engine import RemoteEngine
from backtalk.engines.remote.local import LocalService
from backtalk.engines.remote.service import Datum, ServiceError
from backtalk.errors import ConfigError, SamplerError
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.sampler import SamplingParams
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup

pytest.importorskip("azure.ai.finetuningsessions", reason="pip install 'backtalk[foundry]'")
from azure.core.exceptions import ServiceRequestError, ServiceResponseError

from backtalk.engines.foundry import patience, sdk
from backtalk.engines.foundry.conformance import FoundryUnderTest, OneToken
from backtalk.engines.foundry.loopback import Fault, Loopback

BOTH = ObjectiveConfig(world_model_coeff=0.3)
STEPS = 4
Open = Callable[..., RemoteEngine]


def make_samples() -> list[Sample]:
    """One group of three rows that differ in length and reward."""
    rows = []
    for i, reward in enumerate((1.0, 0.0, 0.5)):
        ids = [7 + (37 * i + 11 * k) % 390 for k in range(24)]
        segments = (
            Segment(TokenRole.CONTEXT, tuple(ids[:4])),
            Segment(TokenRole.ACTION, tuple(ids[4 : 8 + i]), (-6.1,) * (4 + i), turn=0),
            Segment(TokenRole.ENV_OUTPUT, tuple(ids[12 : 24 - i]), turn=0),
        )
        rows.append(Trajectory(task_id="t", sample_index=i, segments=segments, reward=reward))
    return build_samples(TrajectoryGroup("t", tuple(rows)), BOTH)


def take_steps(engine: RemoteEngine, count: int) -> list[float]:
    """Return the loss before each of some steps."""
    return [asyncio.run(engine.train_step(make_samples(), BOTH))["total_loss"] for _ in range(count)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def server(model_dir: Path) -> Iterator[Loopback]:
    one = Loopback(LocalService(model_dir, "sum", lora_rank=4))
    yield one
    one.close()


@pytest.fixture
def open_engine(server: Loopback) -> Iterator[Open]:
    """Return what opens an engine on the server, with adapters that are always the same."""
    services: list[sdk.FoundryService] = []

    def connect(config: FoundryConfig, credential: Any) -> sdk.FoundryService:
        services.append(sdk.connect(config, seed=7, credential=credential))
        return services[-1]

    def opens(credential: Any = None, **settings: Any) -> RemoteEngine:
        settings = {"learning_rate": 1e-2, "reduction": "sum", "timeout_s": 60.0} | settings
        config = FoundryConfig(model=str(server.service.folder), endpoint=server.endpoint, **settings)
        return RemoteEngine(config, lambda: connect(config, credential or OneToken()))

    yield opens
    for service in services:
        service.close()


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[float]:
    """Return the losses of the steps by the same engine on the service itself, without SDK and server."""
    service = LocalService(model_dir, "sum", lora_rank=4)
    config = FoundryConfig(model=str(model_dir), learning_rate=1e-2, reduction="sum")
    losses = take_steps(RemoteEngine(config, lambda: service), STEPS)
    assert len(set(losses)) == STEPS
    return losses


def test_the_conformance_suite_passes_through_the_sdk() -> None:
    """Three checks; `backtalk check --engine foundry` runs all, which tell no more of the way through the SDK."""
    only = {"world_sequence_mean", "zero_coefficient_is_grpo", "microbatches_change_nothing"}
    assert [r.outcome for r in conformance(FoundryUnderTest, only=only)] == [Outcome.PASSED] * 3


def test_steps_are_those_of_the_service_and_a_saved_state_goes_on(
    server: Loopback, open_engine: Open, expected: list[float], tmp_path: Path
) -> None:
    engine = open_engine()
    first = asyncio.run(engine.train_step(make_samples(), BOTH))
    assert first["total_loss"] == pytest.approx(expected[0], rel=1e-6)
    assert first["grad_norm"] > 0 and first["skipped"] == 0
    assert first["service_trained_tokens"] == sum(len(sample) for sample in make_samples())
    assert take_steps(engine, 1) == pytest.approx(expected[1:2], rel=1e-6)
    engine.save(tmp_path / "two")
    assert take_steps(engine, 2) == pytest.approx(expected[2:], rel=1e-6)
    names = ["sessions", *("forward", "forward_backward", "optim_step") * 2, "checkpoint"]
    assert server.calls[: len(names)] == names

    resumed = open_engine()
    resumed.load(tmp_path / "two")
    assert resumed.policy_version == 2
    assert take_steps(resumed, 2) == pytest.approx(expected[2:], rel=1e-6)  # Adam's state came back too


def test_the_first_step_measures_the_reduction_in_a_session_that_is_unloaded(
    server: Loopback, open_engine: Open, expected: list[float]
) -> None:
    engine = open_engine(reduction="auto")
    assert take_steps(engine, 2) == pytest.approx(expected[:2], rel=1e-6)
    assert engine._reduction == "sum" and len(server.service.models) == 2 and len(server.sessions) == 1


async def test_actions_are_the_policys_own(open_engine: Open) -> None:
    engine = open_engine(max_logprob_gap=math.inf)  # the rows that are trained are not the sampled ones
    prompt = list(range(20, 30))
    for _ in range(2):  # after a step they are of its weights
        sampler = engine.sampler(SamplingParams(max_tokens=5, seed=3))

        async def sample(key: str, sampler: Any = sampler) -> Any:
            async with sampler.session(key) as session:
                return await session.sample(prompt)

        same, again, other = await asyncio.gather(sample("a"), sample("a"), sample("b"))
        assert same == again != other and len(same.token_ids) <= 5
        row = Segment(TokenRole.CONTEXT, (*prompt, *same.token_ids))
        scored = await engine.score([Trajectory(task_id="t", sample_index=0, segments=(row,))])
        assert scored[0][10:] == pytest.approx(same.logprobs, abs=1e-5)
        await engine.train_step(make_samples(), BOTH)


DEAD = {"status": "failed", "error_code": "engine_dead", "error": "the engine died"}
LOST = {"status": "failed", "error_code": "operation_completed_result_unavailable", "error": "no result is kept"}


FAULTS = (
    (Fault(operation="forward_backward", status=500, body={"message": "an unknown error"}), "an unknown error"),
    (Fault(operation="forward_backward", is_result=True, body=DEAD), r"engine died; the session is lost.*--resume"),
    (Fault(operation="optim_step", status=502, is_done=True), "did not give an optimizer step"),
    (Fault(operation="optim_step", is_result=True, is_done=True, body=LOST), "no result is kept"),
    (Fault(operation="optim_step", is_result=True, body={"status": "pending"}), "no answer for 2 s"),
)


def test_a_step_that_stops_half_way_is_not_counted_nor_sent_again(
    server: Loopback, open_engine: Open, expected: list[float], tmp_path: Path
) -> None:
    engine = open_engine(timeout_s=2.0)
    take_steps(engine, 1)
    engine.save(tmp_path / "one")
    for fault, words in FAULTS:
        server.faults.append(fault)
        server.calls.clear()
        with pytest.raises(ServiceError, match=words):
            take_steps(engine, 1)
        assert engine.policy_version == 1 and server.calls.count(fault.operation) == 1
        with pytest.raises(ServiceError, match=r"step 1 stopped half way.*--resume"):
            take_steps(engine, 1)
        engine.load(tmp_path / "one")
    assert take_steps(engine, 2) == pytest.approx(expected[1:3], rel=1e-6) and engine.policy_version == 3


BUSY = {"detail": {"reason": "engine_busy", "message": "no capacity", "retry_after_sec": 0.01}}
AGAIN = {"status": "failed", "should_retry": True, "retry_after_sec": 0.01, "error": "the pod was drained"}


REFUSALS = (
    Fault(operation="sessions", status=503, body=BUSY),
    Fault(operation="forward", status=500, body={"message": "an unknown error"}),
    Fault(operation="forward_backward", status=429, headers={"Retry-After": "0"}, body={"message": "quota"}),
    Fault(operation="forward_backward", is_result=True, body=AGAIN),
    Fault(operation="optim_step", status=503, body=BUSY),
)


def test_what_was_refused_or_does_no_harm_is_sent_again(
    server: Loopback, open_engine: Open, expected: list[float]
) -> None:
    server.faults += [*REFUSALS, *REFUSALS]
    assert take_steps(open_engine(), 2) == pytest.approx(expected[:2], rel=1e-6)
    assert not server.faults


class Rotating(OneToken):
    """A credential whose token is another one each time."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)

    @property
    def token(self) -> str:  # type: ignore[override]
        return self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]


def test_an_expired_token_is_replaced_once(server: Loopback, open_engine: Open, expected: list[float]) -> None:
    server.tokens = {"first"}
    engine = open_engine(Rotating(["first", "second", "third"]))
    take_steps(engine, 1)
    server.tokens = {"second"}  # the first one expires between two steps
    assert take_steps(engine, 1) == pytest.approx(expected[1:2], rel=1e-6)
    server.tokens = set()
    with pytest.raises(ServiceError, match=r"the token has expired.*type `az login`"):
        take_steps(engine, 1)


def test_a_session_that_has_expired(server: Loopback, open_engine: Open) -> None:
    engine = open_engine()
    take_steps(engine, 1)
    server.sessions.clear()
    with pytest.raises(ServiceError, match=r"there is no session.*the session has expired.*--resume"):
        take_steps(engine, 1)
    assert engine.policy_version == 1


def test_a_project_that_refuses_and_says_nothing(server: Loopback, open_engine: Open) -> None:
    server.faults.append(Fault(operation="sessions", status=403))
    with pytest.raises(ServiceError, match=r"did not give a session: .*needs the role Foundry User"):
        take_steps(open_engine(), 1)


@pytest.mark.parametrize(
    ("path", "outcome", "tries", "wait_s"),
    [
        ("/forward_backward", ServiceRequestError("no route"), 3, 0.04),  # 0.01, 0.02, 0.04
        ("/forward_backward", ServiceResponseError("reset"), 1, None),  # it may have been done
        ("/sample", ServiceResponseError("reset"), 4, 0.08),
        ("/sample", ServiceResponseError("reset"), 5, None),
        ("/complete", ServiceRequestError("no route"), 1, None),  # a process without a network ends
    ],
)
def test_what_is_sent_again_after_a_lost_connection(
    path: str, outcome: Exception, tries: int, wait_s: float | None
) -> None:
    assert patience._wait_s(path, outcome, tries, is_question=False) == wait_s
    assert path == "/sample" or patience._wait_s(path, outcome, tries, is_question=True) is None  # the SDK's own work


def test_a_server_that_is_not_there(server: Loopback, open_engine: Open) -> None:
    server.close()
    with pytest.raises(ServiceError, match=r"a session: TimeoutError: found no server .* for 0\.05 s"):
        take_steps(open_engine(timeout_s=0.05), 1)


def write_az(folder: Path, text: str) -> None:
    """Put a program into a folder that stands for Azure's command line."""
    path = folder / "az"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_azures_default_chain_gives_the_token(
    server: Loopback, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential")  # of the chain, the one that needs no network
    config = FoundryConfig(model=str(model_dir), endpoint=server.endpoint)
    write_az(tmp_path, "echo 'Please run az login' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"^no Azure credential for Foundry: [^\n]+; type `az login`, or set[^\n]+$"):
        sdk.connect(config)
    write_az(tmp_path, 'echo \'{"accessToken": "from-az", "expires_on": 4102444800, "subscription": "s"}\'')
    server.tokens = {"from-az"}
    service = sdk.connect(config)
    service.open_model()
    service.close()
    assert not server.sessions


def test_what_cannot_be_connected_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_AI_PROJECT_ENDPOINT", raising=False)
    with pytest.raises(ConfigError, match=r"set engine\.endpoint, or AZURE_AI_PROJECT_ENDPOINT"):
        sdk.connect(FoundryConfig(), credential=OneToken())
    with pytest.raises(ConfigError, match=r"http://far\.example' is refused by the SDK.*use https"):
        sdk.connect(FoundryConfig(endpoint="http://far.example"), credential=OneToken())
    monkeypatch.setattr(sdk, "version", lambda name: "1.0.0b2")
    with pytest.raises(ConfigError, match=r"1\.0\.0b2 is installed.*1\.0\.0b1 is known to work"):
        sdk.connect(FoundryConfig())


async def test_an_action_without_its_stop_token_or_its_log_probabilities_is_refused() -> None:
    for tokens, logprobs in (([8, 9], [-1.0, -1.0]), ([8, 2], None), ([8, 2], [-1.0])):
        sequence = type("Sequence", (), {"tokens": tokens, "logprobs": logprobs})()
        session = type("Session", (), {"sample": lambda *a, s=sequence, **k: type("R", (), {"sequences": [s]})()})()
        with pytest.raises(SamplerError, match="an action needs the log-probability of each, its stop token included"):
            await sdk.FoundryWeights(session, "c", 1).sample([1], max_tokens=4, temperature=1.0, seed=0, stop=[2])


def test_a_row_goes_out_shifted_with_weights() -> None:
    datum = sdk._datum(Datum(token_ids=[5, 6, 7], inputs={"advantages": [0.5, -1.0], "logprobs": [-1.0, -2.0]}))
    inputs = datum.loss_fn_inputs
    assert datum.model_input.chunks[0].tokens == [5, 6] and inputs.target_tokens.data == [6, 7]
    assert inputs.weights.data == [1.0, 1.0] and inputs.advantages.data == [0.5, -1.0]
