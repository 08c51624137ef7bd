"""Rollouts for tests of the embedded samplers, small models, and a plain forward pass to compare with."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import torch

from backtalk.rollout.sampler import Completion, Sampler

VOCAB = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
Transcripts = dict[str, list[Completion]]


def sharpen(model: Any) -> Any:
    """Enlarge the weights, since those of a new model give nearly the same distribution for every history."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


def tokens(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]


async def cancel_amid_actions(sampler: Any) -> None:
    """Start three rollouts, cancel them once a token of theirs is sampled, and wait for their sessions to close."""
    started, loop = asyncio.Event(), asyncio.get_running_loop()

    def note_start(token: int) -> bool:
        loop.call_soon_threadsafe(started.set)
        return False  # the action goes on

    async def rollout(key: str) -> None:
        async with sampler.session(key) as session:
            await session.sample_watched([1, 2, 3], None, note_start)

    tasks = [asyncio.create_task(rollout(key)) for key in "abc"]
    await started.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def play(
    sampler: Sampler,
    rows: int = 6,
    turns: Callable[[int], int] = lambda row: 1 + row % 4,
    delay_s: Callable[[int], float] = lambda row: 0.0,
    check: Callable[[list[int], Completion], None] | None = None,
) -> Transcripts:
    """Run multi-turn rollouts of uneven length that end after different numbers of turns; two rows share a prompt."""

    async def rollout(row: int) -> list[Completion]:
        history = tokens(random.Random(row // 2), 3, 40)
        rng = random.Random(100 + row)
        done = []
        async with sampler.session(f"row{row}") as session:
            for turn in range(turns(row)):
                await asyncio.sleep(delay_s(row))
                completion = await session.sample(history, max_tokens=None if turn % 2 == 0 else 3 + row)
                history = history + list(completion.token_ids)
                done.append(completion)
                if check is not None:
                    check(history, completion)
                history += tokens(rng, 0 if turn == 1 else 1, 30)
        return done

    results = await asyncio.gather(*(rollout(row) for row in range(rows)))
    return {f"row{row}": done for row, done in enumerate(results)}


def forced_logprobs(model: Any, history: list[int], count: int, temperature: float) -> torch.Tensor:
    """Return log-probabilities of the last ``count`` tokens by one full forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([history])).logits[0, -count - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(history[-count:])[:, None])[:, 0]


def ids_of(transcripts: Transcripts) -> dict[str, list[tuple[int, ...]]]:
    return {key: [completion.token_ids for completion in done] for key, done in transcripts.items()}
