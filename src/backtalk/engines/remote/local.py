"""A service within this process: a model of transformers behind the API's loss functions and either reduction.

It is for tests, and for a look at what a step would send. All weights are trained, or adapters of PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from backtalk.engines.remote.config import Reduction
from backtalk.engines.remote.service import AdamStep, Datum, LossName, ServiceError
from backtalk.engines.torch.model import add_lora, load_model
from backtalk.rollout.sampler import Completion


class LocalService:
    """A service with one model folder. ``max_rows`` splits requests, as SDKs do with large ones."""

    def __init__(
        self, folder: Path, reduction: Reduction, *, max_rows: int | None = None, lora_rank: int | None = None
    ) -> None:
        self.folder, self.max_rows, self.lora_rank = folder, max_rows, lora_rank
        self.reduction: Reduction = reduction
        self.models: list[LocalModel] = []  # in the order in which they were opened
        self.states: dict[str, Any] = {}
        self.is_closed = False

    def open_model(self, state: str | None = None) -> LocalModel:
        """Return a model as it is in the folder, or as it was saved."""
        if state is not None and state not in self.states:
            raise ServiceError(f"no state was saved at {state}")
        model = LocalModel(self)
        if state is not None:
            weights, optimizer = copy.deepcopy(self.states[state])  # an optimizer goes on with the tensors it is given
            model.network.load_state_dict(weights)
            model.optimizer.load_state_dict(optimizer)
        self.models.append(model)
        return model

    def close(self) -> None:
        """End the session."""
        self.is_closed = True


class LocalModel:
    """A model that is trained. ``gradients`` holds those of the last step, by the name of the weight."""

    def __init__(self, service: LocalService) -> None:
        self.service = service
        self.network: Any = load_model(str(service.folder), torch.device("cpu"), torch.float32)
        if service.lora_rank is not None:
            self.network = add_lora(self.network, service.lora_rank, seed=0)
        self.optimizer = torch.optim.AdamW(p for p in self.network.parameters() if p.requires_grad)
        self.gradients: dict[str, Tensor] = {}
        self._rows = 0  # since the last step

    def run(self, data: Sequence[Datum], loss: LossName, *, backward: bool) -> list[list[float]]:
        """Run the rows, in requests of at most ``max_rows``."""
        size = self.service.max_rows or len(data)
        found: list[list[float]] = []
        for start in range(0, len(data), size):
            found += self._run(data[start : start + size], loss, backward)
        return found

    def _run(self, data: Sequence[Datum], loss: LossName, backward: bool) -> list[list[float]]:
        ids_BT = pad_sequence([torch.tensor(row.token_ids) for row in data], batch_first=True)
        sizes = [len(row.token_ids) - 1 for row in data]
        with torch.set_grad_enabled(backward):
            logits = self.network(input_ids=ids_BT[:, :-1]).logits
            logprobs_BT = logits.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
            if backward:
                rows = zip(data, logprobs_BT, sizes, strict=True)
                losses = [_loss(row, x[:n], loss, self.service.reduction) for row, x, n in rows]
                torch.stack(losses).sum().backward()
                self._rows += len(data)
        return [row[:n].tolist() for row, n in zip(logprobs_BT.detach(), sizes, strict=True)]

    def step(self, adam: AdamStep) -> dict[str, float]:
        """Take a step of AdamW."""
        for parameter in self.network.parameters():
            if parameter.grad is not None and self.service.reduction == "row_mean":
                parameter.grad /= max(self._rows, 1)
        named = self.network.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), adam.grad_clip_norm or float("inf"))
        settings = {"lr": adam.learning_rate, "betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay}
        self.optimizer.param_groups[0].update(settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._rows = 0
        return {"local/grad_norm": float(norm)}

    def save(self, name: str) -> str:
        """Keep a copy of weights and optimizer in memory."""
        path, state = f"local/{name}", (self.network.state_dict(), self.optimizer.state_dict())
        self.service.states[path] = copy.deepcopy(state)
        return path

    def sampling_weights(self) -> LocalWeights:
        """Return a copy of the weights."""
        return LocalWeights(copy.deepcopy(self.network))


class LocalWeights:
    """A copy of the weights, to be sampled from."""

    def __init__(self, network: Any) -> None:
        self._network = network

    async def sample(
        self, token_ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int, stop: Sequence[int]
    ) -> Completion:
        """Sample token by token, without a cache."""
        generator, ids, logprobs = torch.Generator().manual_seed(seed), list(token_ids), list[float]()
        while len(logprobs) < max_tokens and not (logprobs and ids[-1] in stop):
            with torch.no_grad():
                logits_V = self._network(input_ids=torch.tensor([ids])).logits[0, -1]
            row_V = logits_V.div(temperature or 1.0).log_softmax(-1)
            token = int(row_V.argmax() if temperature == 0 else torch.multinomial(row_V.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(row_V[token]))
        return Completion(tuple(ids[len(token_ids) :]), tuple(logprobs), ids[-1] in stop)


def _loss(row: Datum, logprobs: Tensor, name: LossName, reduction: Reduction) -> Tensor:
    """Return the loss of a row by the API's formulas, reduced as the service does; weights not sent are 1."""
    inputs = {key: torch.tensor(values, dtype=torch.float32) for key, values in row.inputs.items()}
    weights = inputs.get("weights", torch.ones_like(logprobs))
    match name:
        case "cross_entropy":
            losses = -logprobs
        case "importance_sampling":
            losses = -(logprobs - inputs["logprobs"]).exp() * inputs["advantages"]
    total = (losses * weights).sum()
    return total if reduction == "sum" else total / weights.sum().clamp(min=1e-9)
