"""A server of the Tinker API under test: it serves the table model, and the gradient is read off the adapters.

The model has a layer whose down projection gets the one-hot vector of the last token (``write_table_model``). A step of
plain descent moves the projection's adapter from B = 0 to B = -scale G A^T, where G is the gradient of its weight and
scale is alpha / rank; A of twice its width is as good as never singular, so it gives G back.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from backtalk.engines.conformance import Step, StepResult
from backtalk.engines.conformance.suite import without_observations
from backtalk.engines.conformance.table import VOCABULARY, projection_gradients
from backtalk.engines.remote.config import Reduction
from backtalk.engines.remote.engine import RemoteEngine
from backtalk.engines.remote.service import AdamStep, Datum, LossName, SamplingWeights, ServiceError
from backtalk.engines.tinker.config import TinkerConfig
from backtalk.engines.tinker.sdk import SdkModel, connect, httpx, served_models, tinker
from backtalk.errors import ConfigError

RANK = 2 * VOCABULARY
_EPS = 1e8  # so far above any gradient that AdamW takes the step lr / eps * gradient, to the last bit of float32
_ROW = tuple(range(100, 148, 3))
_PROJECTION = "down_proj.lora_"


class ServedUnderTest:
    """The engine against a server that serves the table model with adapters of rank ``RANK``."""

    tolerance = 1e-4
    noise = 1e-6  # of a gradient; those of the batch are of 1e-4 to 1

    def __init__(self, model_folder: Path, base_url: str) -> None:
        names = served_models(base_url)
        config = TinkerConfig(
            model=names[0], base_url=base_url, tokenizer=str(model_folder), lora_rank=RANK, learning_rate=1.0
        )
        self._models: list[_Descent] = []
        # The engine measures it by small steps, in which the table is far from linear.
        config = replace(config, reduction=_measured_reduction(_Service(config, self._models).open_model()))
        self._engine = RemoteEngine(config, lambda: _Service(config, self._models))

    def train_step(self, step: Step) -> StepResult:
        if step.processes > 1:
            raise ConfigError("the engine is one process, and the service shards the model by itself")
        if step.microbatches > 1:
            raise ConfigError("the service splits a step into micro-batches by itself, and cannot be asked how")
        metrics = asyncio.run(self._engine.train_step(step.samples, step.objective))
        model = self._models[-1]
        rows = projection_gradients(model.gradient, step.samples)
        rows = [[x if abs(x) > self.noise else 0.0 for x in row] for row in rows]
        return StepResult(gradients=rows, metrics=[metrics], raw=[model.moved])

    def own_grpo(self, step: Step) -> StepResult:
        """Take the step on samples that know of no observation."""
        bare = [replace(without_observations(sample), world_scale=None) for sample in step.samples]
        return self.train_step(replace(step, samples=bare, objective=replace(step.objective, world_model_coeff=0.0)))


def _measured_reduction(model: _Descent) -> Reduction:
    """Return how the server reduces losses: by what a quarter of the weight makes of the gradient."""
    norms = []
    for weight in (1.0, 0.25):
        row = Datum(token_ids=_ROW, inputs={"weights": [weight] * (len(_ROW) - 1)})
        model.run([row], "cross_entropy", backward=True)
        model.step(AdamStep(learning_rate=1.0, betas=(0.0, 0.0)))
        norms.append(float(model.moved.norm()))
    ratio = norms[1] / norms[0]
    known: dict[Reduction, float] = {"sum": 0.25, "row_mean": 1.0}
    for name, expected in known.items():
        if math.isclose(ratio, expected, rel_tol=1e-3):
            return name
    raise ConfigError(
        f"the server reduces losses in a way that is not known: a quarter of the weight makes {ratio:.3g} of the "
        "gradient, where a sum makes 0.25 of it and a mean by weights 1"
    )


class _Service:
    """A session whose models are put into ``models``."""

    def __init__(self, config: TinkerConfig, models: list[_Descent]) -> None:
        self._service, self._url, self._models = connect(config), config.base_url, models

    def open_model(self, state: str | None = None) -> _Descent:
        self._models.append(_Descent(self._service.open_model, str(self._url)))
        return self._models[-1]

    def close(self) -> None:
        self._service.close()


class _Descent:
    """A model that takes each step from its first weights, by plain descent, and reads the gradient off it."""

    gradient: Tensor  # of the projection's weight, in the last step
    moved: Tensor  # B after it, as the server wrote it

    def __init__(self, open_model: Callable[[str | None], SdkModel], url: str) -> None:
        self._open, self._url = open_model, url
        self._model = open_model(None)
        self._start = self._model.save("table")

    def run(self, data: Sequence[Datum], loss: LossName, *, backward: bool) -> list[list[float]]:
        return self._model.run(data, loss, backward=backward)

    def step(self, adam: AdamStep) -> dict[str, float]:
        metrics = self._model.step(AdamStep(learning_rate=_EPS, betas=(0.0, 0.0), eps=_EPS))
        config, tensors = self._adapters()
        found = {name: [value for key, value in tensors.items() if _PROJECTION + name in key] for name in "AB"}
        if not all(len(values) == 1 for values in found.values()):
            raise ConfigError(
                f"the server wrote {', '.join(tensors)}, and no adapter of the layer's down projection, from which the "
                "gradients of the suite's model are read; start it on that model, as docs/engines.md says"
            )
        a_RH, self.moved = found["A"][0].double(), found["B"][0]
        scale = config["lora_alpha"] / config["r"]
        self.gradient = -(self.moved.double() @ torch.linalg.pinv(a_RH).T) / scale
        self._model.unload(self._url)  # a server has room for some models alone
        self._model = self._open(self._start)  # SkyRL's loads weights into no model that has been used
        return metrics

    def save(self, name: str) -> str:
        return self._model.save(name)

    def sampling_weights(self) -> SamplingWeights:
        return self._model.sampling_weights()

    def _adapters(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the settings and the weights of the adapters, as the server hands them out."""
        return read_adapters(self._model, self._url, f"read-{time.monotonic_ns()}")


def read_adapters(model: SdkModel, url: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return adapter_config.json and the weights of a model's adapters, which the server keeps under ``name``."""
    path = model.write_adapters(name)
    rest = tinker.ServiceClient(base_url=url, api_key="tml-none").create_rest_client()
    archive = rest.get_checkpoint_archive_url(path.removeprefix("tinker://").split("/")[0], name).result().url
    answer = httpx.get(archive, follow_redirects=True, timeout=60)
    if answer.is_error:
        raise ServiceError(f"{url} does not hand out the adapters that it saved: {answer.status_code} {answer.text}")
    found: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as files:
        for member in files:
            file = files.extractfile(member)
            if file is not None:
                found[member.name.rsplit("/", 1)[-1]] = file.read()
    return json.loads(found["adapter_config.json"]), load_safetensors(found["adapter_model.safetensors"])
