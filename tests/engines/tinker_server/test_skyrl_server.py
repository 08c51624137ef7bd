"""The Tinker engine against SkyRL's server with its JAX backend, on the CPU: `scripts/skyrl test` runs this.

What the service does to the adapters is read from the files that it writes, and compared with PyTorch and PEFT.
"""

from __future__ import annotations

import asyncio
import http.client
import math
import os
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from backtalk.engines.remote.engine import RemoteEngine
from backtalk.engines.remote.gradients import step_gradients
from backtalk.engines.remote.reduction import forward, linear_loss
from backtalk.engines.remote.service import AdamStep, ServiceError
from backtalk.engines.tinker.config import TinkerConfig
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.sampler import SamplingParams
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_model_dir

if "BACKTALK_TINKER_SERVER" not in os.environ:
    pytest.skip("SkyRL's server is not installed here; type `scripts/skyrl test`", allow_module_level=True)
sdk = pytest.importorskip("backtalk.engines.tinker.sdk")

PATIENCE_S = float(os.environ.get("BACKTALK_TINKER_PATIENCE_S", "300"))  # for the server to start, and for one answer
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SERVER = Path(__file__).parents[3] / "examples/skyrl_server.py"
RANK, ALPHA = 4, 32  # SkyRL's server fixes the second
RATE, EPS = 100.0, 1e6  # a step of AdamW without memory and with this eps is RATE times the gradient
BOTH = ObjectiveConfig(world_model_coeff=0.3)


class Server:
    """SkyRL's server over a tiny model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, tiny_model_dir(folder / "model", tie_word_embeddings=False)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        python = os.environ["BACKTALK_TINKER_SERVER"]
        command = [python, str(SERVER), str(self.model), str(folder), "--port", str(self.port), "--rank", str(RANK)]
        self.log = (folder / "server.log").open("wb")
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env=environment, start_new_session=True
        )
        try:
            self._wait()
        except BaseException:  # Ctrl-C too: it is in a session of its own
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self._is_up():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            time.sleep(1)

    def _is_up(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        except OSError:
            return False

    def stop(self) -> None:
        """Kill the server and the engine that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def config(self, **settings: Any) -> TinkerConfig:
        return TinkerConfig(model=str(self.model), base_url=self.url, lora_rank=RANK, timeout_s=PATIENCE_S, **settings)

    def engine(self, **settings: Any) -> RemoteEngine:
        config = self.config(**settings)
        return RemoteEngine(config, lambda: sdk.connect(config, seed=7))

    def adapters(self, model: Any) -> dict[str, Tensor]:
        """Return the adapters of a model, as the server writes them for sampling."""
        path = model._client.save_weights_for_sampler(f"read-{time.monotonic_ns()}").result(PATIENCE_S).path
        model_id, *_, name = path.removeprefix("tinker://").split("/")
        archive = self.folder / "checkpoints" / model_id / "sampler_weights" / f"{name}.tar.gz"
        with tarfile.open(archive) as files:
            member = next(one for one in files if one.name.endswith("adapter_model.safetensors"))
            data = files.extractfile(member)
            assert data is not None
            return load_safetensors(data.read())


class Proxy(ThreadingHTTPServer):
    """A way to a server on which things happen: of some paths the next answer gets lost, others are answered 500."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.port, self.lost, self.broken = port, set[str](), set[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone away


class _Pass(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        body, name = self.rfile.read(int(self.headers.get("content-length", 0))), self.path.rpartition("/")[2]
        if name in self.server.broken:
            return self.answer(500, b"{}", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE_S)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if name in self.server.lost:
            self.server.lost.remove(name)
            return self.answer(500, b"{}", "application/json")
        self.answer(answer.status, content, answer.headers.get("content-type", ""))

    do_POST = do_GET

    def answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def proxy_to(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("skyrl"))
    yield one
    one.stop()


def make_samples(config: ObjectiveConfig = BOTH) -> list[Sample]:
    """One group of three rows of at most 32 tokens, with clipped ratios on both sides."""
    rows = []
    for i, reward in enumerate((1.0, 0.0, 0.5)):
        ids = [7 + (37 * i + 11 * k) % 390 for k in range(28)]
        old = tuple(-6.2 + 0.4 * ((k + i) % 3 - 1) for k in range(6 + i))
        segments = (
            Segment(TokenRole.CONTEXT, tuple(ids[:4])),
            Segment(TokenRole.ACTION, tuple(ids[4 : 10 + i]), old, turn=0),
            Segment(TokenRole.TEMPLATE, tuple(ids[14:16]), turn=0),
            Segment(TokenRole.ENV_OUTPUT, tuple(ids[16 : 28 - 3 * i]), turn=0),
        )
        rows.append(Trajectory(task_id="t", sample_index=i, segments=segments, reward=reward))
    return build_samples(TrajectoryGroup("t", tuple(rows)), config)


def service_gradient(server: Server, service: Any, state: str, config: ObjectiveConfig) -> dict[str, Tensor]:
    """Return the gradient of a step on the service: what plain descent does to adapters saved at ``state``."""
    model, samples = service.open_model(state), make_samples(config)
    before = server.adapters(model)
    logprobs = [[0.0, *row] for row in forward(model, [s.token_ids.tolist() for s in samples])]
    gradients = step_gradients(samples, logprobs, TokenCounts.of(samples), config)
    model.run(*linear_loss(*gradients.rows(), "row_mean"), backward=True)
    model.step(AdamStep(learning_rate=RATE * EPS, betas=(0.0, 0.0), eps=EPS))
    return {name: (before[name] - after) / RATE for name, after in server.adapters(model).items()}


def torch_gradient(server: Server, adapters: dict[str, Tensor], config: ObjectiveConfig) -> dict[str, Tensor]:
    """Return the same gradient by autograd through PEFT's adapters and the objective."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ADAPTED), lora_dropout=0.0)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32), lora)
    set_peft_model_state_dict(model, adapters)
    samples = make_samples(config)
    batch = collate(samples, 0)
    logits = model(input_ids=batch.token_ids_BT[:, :-1]).logits
    logprobs = logits.log_softmax(-1).gather(-1, batch.token_ids_BT[:, 1:, None])[..., 0]
    loss, _ = objective(torch.nn.functional.pad(logprobs, (1, 0)), batch, TokenCounts.of(samples), config)
    loss.backward()
    named = ((name.replace(".default", ""), p.grad) for name, p in model.named_parameters() if p.requires_grad)
    found = {name: gradient for name, gradient in named if gradient is not None}
    # The server holds one A for q, k and v, and one for gate and up, and writes a copy for each.
    twins = {name: [other for other in found if torch.equal(adapters[other], adapters[name])] for name in found}
    return {name: torch.stack([found[other] for other in others]).sum(0) for name, others in twins.items()}


def flat(gradient: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([gradient[name].double().flatten() for name in names])


def test_the_engine_samples_trains_saves_and_goes_on(server: Server, tmp_path: Path) -> None:
    # The rows that are trained are not the sampled ones.
    engine = server.engine(learning_rate=1e-3, max_logprob_gap=math.inf)
    first = asyncio.run(engine.train_step(make_samples(), BOTH))
    assert engine._reduction == "row_mean"  # measured
    assert first["skipped"] == 0 and first["grad_norm"] > 0 and first["service_trained_tokens"] > 0

    async def sample() -> list[Any]:
        found = []
        sampler = engine.sampler(SamplingParams(max_tokens=4, seed=3))
        for key in ("a", "a", "b"):
            async with sampler.session(key) as session:
                found.append(await session.sample(list(range(20, 30))))
        return found

    same, again, other = asyncio.run(sample())
    assert same == again != other and len(same.token_ids) <= 4
    row = Trajectory(
        task_id="t", sample_index=0, segments=(Segment(TokenRole.CONTEXT, (*range(20, 30), *same.token_ids)),)
    )
    scored = asyncio.run(engine.score([row]))[0]
    assert scored[10:] == pytest.approx(same.logprobs, abs=1e-4)  # the sampler has the trained weights

    engine.save(tmp_path / "one")
    losses = [asyncio.run(engine.train_step(make_samples(), BOTH))["total_loss"] for _ in range(3)]
    assert losses[-1] < losses[0] < first["total_loss"]
    resumed = server.engine(learning_rate=1e-3, reduction="row_mean")
    resumed.load(tmp_path / "one")
    assert resumed.policy_version == 1
    assert asyncio.run(resumed.score([row]))[0] == pytest.approx(scored, abs=1e-6)
    again = [asyncio.run(resumed.train_step(make_samples(), BOTH))["total_loss"] for _ in range(3)]
    assert again == pytest.approx(losses, rel=1e-5)  # Adam's state came back too


def test_the_gradient_is_that_of_pytorch_and_peft_and_proportional_to_the_coefficient(server: Server) -> None:
    service = sdk.connect(server.config(), seed=7)
    model = service.open_model()
    moved = make_samples()
    logprobs = [[0.0, *row] for row in forward(model, [s.token_ids.tolist() for s in moved])]
    model.run(
        *linear_loss(*step_gradients(moved, logprobs, TokenCounts.of(moved), BOTH).rows(), "row_mean"), backward=True
    )
    model.step(AdamStep(learning_rate=1e-2, betas=(0.9, 0.95)))  # fresh adapters have B = 0, and A no gradient
    state, adapters = model.save("start"), server.adapters(model)

    found = {}
    for coefficient in (0.0, 0.3, 0.6):
        config = replace(BOTH, world_model_coeff=coefficient)
        expected = torch_gradient(server, adapters, config)
        got = service_gradient(server, service, state, config)
        names = sorted(expected)
        assert names == sorted(got)
        found[coefficient] = flat(got, names)
        wanted = flat(expected, names)
        error = float((found[coefficient] - wanted).norm() / wanted.norm())
        print(f"world_model_coeff {coefficient}: relative error of the gradient {error:.1e}")
        assert error < 1e-4
    once, twice = found[0.3] - found[0.0], found[0.6] - found[0.0]
    assert float((twice - 2 * once).norm() / (2 * once).norm()) < 1e-4


def test_a_server_that_is_not_there_and_a_model_that_it_has_not(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = replace(server.config(), base_url=f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ServiceError, match="no server answers"):
            sdk.connect(gone)
    with pytest.raises(sdk.ConfigError, match=r"has no model 'other'; set engine.model to one of /"):
        sdk.connect(replace(server.config(), model="other"))


def test_answers_that_get_lost_are_asked_for_again_and_the_step_is_taken_once(server: Server) -> None:
    losses = []
    with proxy_to(server) as proxy:
        for lost in (set[str](), {"forward_backward", "optim_step", "retrieve_future"}):
            config = replace(server.config(learning_rate=1e-2, reduction="row_mean"), base_url=proxy.url)
            engine = RemoteEngine(config, lambda config=config: sdk.connect(config, seed=7))
            metrics = []
            for _ in range(3):
                proxy.lost = set(lost)
                metrics.append(asyncio.run(engine.train_step(make_samples(), BOTH)))
                assert not proxy.lost
            losses.append([one["total_loss"] for one in metrics])
            assert engine.policy_version == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] > losses[0][2]


def test_a_server_that_answers_500_in_a_step_leaves_it_uncounted_and_a_saved_state_goes_on(
    server: Server, tmp_path: Path
) -> None:
    with proxy_to(server) as proxy:
        config = replace(server.config(learning_rate=1e-3, reduction="row_mean"), base_url=proxy.url)
        engine = RemoteEngine(config, lambda: sdk.connect(config, seed=7))
        asyncio.run(engine.train_step(make_samples(), BOTH))
        engine.save(tmp_path / "one")
        service: Any = engine._service

        proxy.broken, service._config = {"forward_backward"}, replace(config, timeout_s=3)
        with pytest.raises(ServiceError, match=r"a forward pass: .*no answer; .*its log says which"):
            asyncio.run(engine.train_step(make_samples(), BOTH))
        assert engine.policy_version == 1 and engine._trouble is None  # no gradient was sent

        proxy.broken, service._config = set(), config
        engine.load(tmp_path / "one")
        model: Any = engine._model
        step = model.step

        def fail(adam: AdamStep) -> Any:
            proxy.broken, service._config = {"optim_step"}, replace(config, timeout_s=3)
            return step(adam)

        model.step = fail
        with pytest.raises(ServiceError, match=r"an optimizer step: .*no answer; .*its log says which"):
            asyncio.run(engine.train_step(make_samples(), BOTH))
        assert engine.policy_version == 1
        with pytest.raises(ServiceError, match=r"step 1 stopped half way.*--resume"):
            asyncio.run(engine.train_step(make_samples(), BOTH))

        proxy.broken, service._config = set(), config
        engine.load(tmp_path / "one")
        asyncio.run(engine.train_step(make_samples(), BOTH))
        assert engine.policy_version == 2


def test_a_server_that_dies_in_a_step_leaves_the_step_uncounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "_LOOK_S", 2.0)
    server = Server(tmp_path)
    try:
        engine = server.engine(reduction="row_mean")
        asyncio.run(engine.train_step(make_samples(), BOTH))
        model: Any = engine._model
        step = model.step
        model.step = lambda adam: (server.stop(), step(adam))[1]
        with pytest.raises(ServiceError, match=r"an optimizer step: .*the server is gone; start it again"):
            asyncio.run(engine.train_step(make_samples(), BOTH))
        assert engine.policy_version == 1
        with pytest.raises(ServiceError, match=r"step 1 stopped half way.*--resume"):
            engine.save(tmp_path / "two")
    finally:
        server.stop()
