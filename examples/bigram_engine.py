"""Train a policy of your own: a table of bigrams behind Backtalk's Engine protocol, in place of a neural network.

backtalk train examples/bigram.yaml      # from the folder that holds examples/

It learns nothing worth having. It shows all that a training asks of an engine: a tokenizer, a sampler, a train step
over Backtalk's objective, log-probabilities, and a checkpoint.
"""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tokenizer import load_tokenizer, model_location
from backtalk.objective import objective
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample
from backtalk.rollout.sampler import Completion, SamplingParams
from backtalk.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    """Settings of the engine. Whatever is a field here can be set as engine.FIELD, and is checked by its type."""

    kind: str = "examples.bigram_engine:BigramConfig"
    learning_rate: float = 10.0

    def open(self, *, seed: int) -> "BigramEngine":
        return BigramEngine(self)


class BigramEngine:
    """log p(token | token before it) = logits[before, token] - logsumexp(logits[before]); at temperature 1 alone."""

    def __init__(self, config: BigramConfig) -> None:
        self.tokenizer = load_tokenizer(model_location("base"))
        self.stop_token_ids = Renderer(self.tokenizer, (), RendererConfig(on_drift="fork")).stop_token_ids
        self.logits_VV = torch.zeros(len(self.tokenizer), len(self.tokenizer), requires_grad=True)
        self.optimizer = torch.optim.SGD([self.logits_VV], lr=config.learning_rate)
        self.policy_version = 0

    def sampler(self, params: SamplingParams) -> "BigramSampler":
        return BigramSampler(self, params)

    async def train_step(self, samples: Sequence[Sample], config: ObjectiveConfig) -> dict[str, float]:
        config = config.at(self.policy_version)
        batch, counts = collate(samples, pad_token_id=0), TokenCounts.of(samples, config.world_loss_target)
        loss, metrics = objective(self._logprobs(batch.token_ids_BT), batch, counts, config)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.policy_version += 1
        return {name: float(value) for name, value in metrics.items()}

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        with torch.no_grad():
            return [self._logprobs(torch.tensor([one.token_ids]))[0].tolist() for one in trajectories]

    def save(self, folder: Path) -> None:
        torch.save({"logits": self.logits_VV.detach(), "policy_version": self.policy_version}, folder / "bigrams.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "bigrams.pt", weights_only=True)
        self.logits_VV.data.copy_(state["logits"])
        self.policy_version = state["policy_version"]

    def _logprobs(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Position t scores token t, so nothing is known of the first one: [B, T]."""
        before, token = token_ids_BT[:, :-1], token_ids_BT[:, 1:]
        scores = self.logits_VV[before, token] - self.logits_VV.logsumexp(-1)[before]
        return torch.nn.functional.pad(scores, (1, 0))


class BigramSampler:
    """The policy at one version. A session's random numbers depend on the seed and its key alone."""

    def __init__(self, engine: BigramEngine, params: SamplingParams) -> None:
        self.policy_version = engine.policy_version
        self.logprobs_VV = engine.logits_VV.detach().log_softmax(-1)
        self.stop_token_ids, self.params = engine.stop_token_ids, params

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator["BigramSession"]:
        digest = hashlib.sha256(f"{self.params.seed}/{key}".encode()).digest()
        yield BigramSession(self, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))


class BigramSession:
    """One rollout at the sampler."""

    def __init__(self, sampler: BigramSampler, random: torch.Generator) -> None:
        self.sampler, self.random = sampler, random

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        limit = min(max_tokens or self.sampler.params.max_tokens, self.sampler.params.max_tokens)
        sampled: list[int] = []
        while len(sampled) < limit and not (sampled and sampled[-1] in self.sampler.stop_token_ids):
            row_V = self.sampler.logprobs_VV[[*token_ids, *sampled][-1]]
            sampled.append(int(torch.multinomial(row_V.exp(), 1, generator=self.random)))
        before = [token_ids[-1], *sampled[:-1]]
        logprobs = self.sampler.logprobs_VV[before, sampled].tolist()
        return Completion(tuple(sampled), tuple(logprobs), sampled[-1] in self.sampler.stop_token_ids)
