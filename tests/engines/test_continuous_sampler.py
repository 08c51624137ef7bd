"""The continuous sampler against plain forward passes and the wave sampler; what waits for what is seen by events."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from backtalk.engines.torch.continuous import ContinuousTorchSampler
from backtalk.engines.torch.kv import History
from backtalk.engines.torch.kv_slots import SlotKVCache
from backtalk.engines.torch.sampler import TorchSampler
from backtalk.errors import ConfigError, SamplerError
from backtalk.rollout.sampler import Completion, ContinuousSampler, SamplingParams
from sampler_play import SMALL, VOCAB, cancel_amid_actions, forced_logprobs, ids_of, play, sharpen, tokens

PATIENCE_S = 60  # of a test that would otherwise wait for ever


def sampler_of(model: Any, stop_token_ids: Sequence[int] = tuple(range(9)), **settings) -> ContinuousTorchSampler:
    params = SamplingParams(max_tokens=settings.pop("max_tokens", 14), temperature=settings.pop("temperature", 1.0))
    return ContinuousTorchSampler(model, params=params, stop_token_ids=stop_token_ids, pad_token_id=0)


def wave_sampler_of(model: Any, **settings) -> TorchSampler:
    params = SamplingParams(max_tokens=settings.pop("max_tokens", 14))
    return TorchSampler(model, params=params, stop_token_ids=tuple(range(9)), pad_token_id=0)


class Watch:
    """Does something in the event loop when the ``count``-th token of an action is there, before the next one."""

    def __init__(self, count: int, act: Any, until: threading.Event) -> None:
        self.loop, self.count, self.act, self.until = asyncio.get_running_loop(), count, act, until
        self.seen: list[int] = []

    def __call__(self, token: int) -> bool:
        self.seen.append(token)
        if len(self.seen) == self.count:
            self.loop.call_soon_threadsafe(self.act)
            assert self.until.wait(PATIENCE_S)
        return False


@pytest.mark.parametrize("name", ["qwen", "llama"])
@pytest.mark.parametrize(("attention", "temperature"), [("sdpa", 1.0), ("sdpa", 0.7), ("eager", 1.0)])
async def test_logprobs_are_those_of_a_plain_forward_pass(
    name: str, attention: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    model.set_attn_implementation(attention)
    sampler = sampler_of(model, temperature=temperature)
    lengths = set()

    def check(history: list[int], completion: Completion) -> None:
        count = len(completion.token_ids)
        expected = forced_logprobs(model, history, count, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
        lengths.add(count)

    async with asyncio.timeout(PATIENCE_S):
        await play(sampler, rows=8, delay_s=lambda row: 0.003 * (row % 3), check=check)
    model.set_attn_implementation("sdpa")
    assert len(lengths) > 4
    assert sampler.stats.kv.reused_tokens > 0
    assert sampler.stats.kv.shared_tokens > 0


async def test_tokens_are_those_of_waves_whoever_comes_first(qwen: Any) -> None:
    waves = ids_of(await play(wave_sampler_of(qwen)))
    assert ids_of(await play(sampler_of(qwen))) == waves
    assert ids_of(await play(sampler_of(qwen), delay_s=lambda row: 0.004 * (6 - row))) == waves
    ahead = sampler_of(qwen)
    ahead._decoder._runs_ahead = True  # as on a GPU
    assert ids_of(await play(ahead)) == waves


async def test_a_slow_command_holds_no_other(qwen: Any) -> None:
    """Rollout a has sampled and waits for a command for ever, while b goes through its turns."""
    sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=5)
    async with asyncio.timeout(PATIENCE_S), sampler.session("a") as a, sampler.session("b") as b:
        await a.sample([1, 2, 3])
        history = [4, 5]
        for _ in range(3):
            history += [*(await b.sample(history)).token_ids, 6]
    assert sampler.stats.decode_steps == 4 + 3 * 4  # the first token of an action comes with its prompt
    assert sampler.stats.decode_rows == 4 + 3 * 4


@pytest.mark.parametrize("runs_ahead", [False, True])
async def test_a_rollout_joins_between_two_tokens_and_leaves(qwen: Any, runs_ahead: bool) -> None:
    sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=9)
    sampler._decoder._runs_ahead = runs_ahead
    asked, left = threading.Event(), threading.Event()

    async with asyncio.timeout(PATIENCE_S), sampler.session("long") as long, sampler.session("short") as short:

        async def ask() -> Completion:
            completion = await short.sample([4, 5], max_tokens=2)
            left.set()
            return completion

        tasks: list[asyncio.Task[Completion]] = []

        def start() -> None:
            tasks.append(asyncio.create_task(ask()))
            asyncio.get_running_loop().call_soon(asked.set)

        joins = Watch(4, start, asked)
        leaves = Watch(7, lambda: None, left)  # the short action has been answered by then, amid the long one
        completion = await long.sample_watched([1, 2, 3], None, lambda token: joins(token) or leaves(token))
        assert len(completion.token_ids) == 9
        assert len((await tasks[0]).token_ids) == 2
    if not runs_ahead:  # the long one runs 8 tokens, the short one 1 beside it
        assert (sampler.stats.decode_steps, sampler.stats.decode_rows) == (8, 8 + 1)
    else:  # and the last of each too, before it is known to be the last
        assert (sampler.stats.decode_steps, sampler.stats.decode_rows) == (9, 9 + 2)


async def test_cancelling_amid_an_action_ends_it_at_the_next_token(qwen: Any) -> None:
    sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=40)
    cancelled = threading.Event()
    async with asyncio.timeout(PATIENCE_S), sampler.session("a") as a, sampler.session("b") as b:

        async def ask() -> None:
            try:
                await a.sample_watched([1, 2, 3], None, Watch(5, lambda: task.cancel(), cancelled))
            except asyncio.CancelledError:
                asyncio.get_running_loop().call_soon(cancelled.set)
                raise

        task = asyncio.create_task(ask())
        beside = await b.sample([4, 5])
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sampler.stats.action_tokens == 5 + 40
        again = await a.sample([1, 2, 3, 7, 8])
    for history, completion in (([4, 5], beside), ([1, 2, 3, 7, 8], again)):
        expected = forced_logprobs(qwen, [*history, *completion.token_ids], 40, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


async def test_when_the_last_session_has_closed_the_model_is_at_rest_and_may_change() -> None:
    """Rollouts are cancelled amid their actions; the next version samples with its weights, and keeps no old keys."""
    torch.manual_seed(1)
    model = sharpen(LlamaForCausalLM(LlamaConfig(**SMALL))).train()
    sampler = sampler_of(model, stop_token_ids=[], max_tokens=500)
    async with asyncio.timeout(PATIENCE_S):
        await cancel_amid_actions(sampler)
    assert sampler._run is not None and sampler._run.done()
    assert model.training
    assert sampler.stats.action_tokens < 3 * 500
    assert not sampler._decoder.cache._buffers()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    for updated in (sampler_of(model), sampler):
        async with updated.session("a") as session:
            completion = await session.sample([1, 2, 3])
        expected = forced_logprobs(model, [1, 2, 3, *completion.token_ids], len(completion.token_ids), 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(3))
async def test_no_order_of_rollouts_stops_the_others(qwen: Any, seed: int) -> None:
    """Thirty rollouts, four at a time, with commands of uneven length; some are cancelled wherever they are."""
    sampler, places, rng = sampler_of(qwen), asyncio.Semaphore(4), random.Random(seed)
    done: list[int] = []

    async def rollout(row: int) -> None:
        noise = random.Random(100 * seed + row)
        async with places, sampler.session(f"{row}") as session:
            history = tokens(noise, 1, 30)
            for _ in range(noise.randint(1, 4)):
                history += (await session.sample(history)).token_ids
                await asyncio.sleep(noise.choice([0, 0, 0.01, 0.03]))
                history += tokens(noise, 1, 30)
            done.append(row)

    async with asyncio.timeout(PATIENCE_S):
        tasks = [asyncio.create_task(rollout(row)) for row in range(30)]
        doomed = rng.sample(range(30), 8)
        for row in doomed:
            await asyncio.sleep(rng.choice([0, 0.005, 0.02]))
            tasks[row].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert set(done) >= set(range(30)) - set(doomed)
    assert not sampler.open_sessions
    assert not sampler._decoder.cache._owners


async def test_a_session_that_closes_before_its_answer_gives_its_row_back(qwen: Any) -> None:
    sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=400)
    async with asyncio.timeout(PATIENCE_S):
        async with sampler.session("a") as session:
            waiting = asyncio.create_task(session.sample([1, 2, 3]))
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not sampler._decoder._rows
        async with sampler.session("a") as session:
            assert len((await session.sample([1, 2, 3], max_tokens=3)).token_ids) == 3


async def test_a_prompt_is_run_once_though_its_rollouts_come_one_after_the_other(qwen: Any) -> None:
    sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=4)
    prompt = tokens(random.Random(0), 20, 20)
    async with asyncio.timeout(PATIENCE_S), sampler.session("a") as a, sampler.session("b") as b:
        first = await a.sample(prompt)
        second = await b.sample(prompt)
    assert first.token_ids != second.token_ids
    assert (sampler.stats.kv.prefilled_tokens, sampler.stats.kv.shared_tokens) == (20 + 1, 19)
    for completion in (first, second):
        expected = forced_logprobs(qwen, [*prompt, *completion.token_ids], 4, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_rows_that_join_step_and_leave_in_any_order(llama: Any, seed: int) -> None:
    """Every row's logits are those of its own tokens, after any sequence of what a sampler does with the cache."""
    rng = random.Random(seed)
    cache = SlotKVCache(llama, 0, torch.device("cpu"), max_tokens=48, max_padding=8)
    known: dict[str, list[int]] = {}  # tokens of every session
    decoding: list[str] = []  # sessions by row
    logits = torch.zeros(0, VOCAB)
    for number in range(60):
        idle = [name for name in known if name not in decoding]
        action = rng.choice(["join", "join", "step", "step", "step", "leave", "free"])
        if action == "join":
            names = rng.sample(idle, min(len(idle), rng.randint(0, 2)))
            for name in names:
                known[name] = known[name] + tokens(rng, 1, 60)
                if rng.random() < 0.2:
                    known[name] = known[name][: rng.randint(1, len(known[name]))]
            prompt = tokens(rng, 1, 60)
            for i in range(rng.randint(0, 3)):
                known[f"{number}/{i}"] = prompt if i < 2 else tokens(rng, 1, 90)
                names.append(f"{number}/{i}")
            if names:
                order, new = cache.join([History(name, tuple(known[name])) for name in names])
                logits = torch.cat([logits, new]) if decoding else new
                decoding += [names[i] for i in order]
        elif action == "step" and decoding:
            ids = tokens(rng, len(decoding), len(decoding))
            for name, token in zip(decoding, ids, strict=True):
                known[name] = [*known[name], token]
            logits = cache.step(torch.tensor(ids))
        elif action == "leave" and decoding:
            alive = [rng.random() < 0.6 for _ in decoding]
            cache.end([History(n, tuple(known[n])) for n, a in zip(decoding, alive, strict=True) if not a])
            kept = cache.keep(alive)
            decoding, logits = [decoding[i] for i in kept], logits[kept]
        elif action == "free" and idle:
            name = rng.choice(idle)
            cache.free(name)
            del known[name]
        for name, row in zip(decoding, logits, strict=True):
            expected = llama(torch.tensor([known[name]])).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)
    assert cache.stats.shared_tokens > 0 and cache.stats.reused_tokens > 0


async def test_an_error_fails_the_calls_that_are_there_and_no_later_one(llama: Any) -> None:
    sampler = sampler_of(llama)
    async with asyncio.timeout(PATIENCE_S), sampler.session("a") as a, sampler.session("b") as b:
        with pytest.raises(SamplerError, match=r"sampling 1 rows failed: IndexError"):
            await a.sample([1, VOCAB + 1])  # no such token
        for session in (a, b):
            assert (await session.sample([1, 2])).token_ids
    assert llama.training is False


async def test_broken_weights_are_an_error_not_a_sample() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    async with asyncio.timeout(PATIENCE_S), sampler_of(model).session("a") as session:
        with pytest.raises(SamplerError, match="not finite"):
            await session.sample([1, 2])


def test_a_model_whose_rows_cannot_join_is_refused() -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
    with pytest.raises(ConfigError, match=r"not full attention.*use engine.batching='wave'"):
        sampler_of(model)


async def test_a_loop_that_ends_leaves_no_thread_behind(qwen: Any) -> None:
    """As Ctrl-C does: the rollouts' tasks are cancelled, and the loop is closed."""

    async def abandon() -> ContinuousTorchSampler:
        sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=500)

        async def rollout() -> None:
            async with sampler.session("a") as session:
                await session.sample([1, 2, 3])

        with suppress(TimeoutError):
            await asyncio.wait_for(rollout(), 0.05)
        return sampler

    sampler = await asyncio.to_thread(asyncio.run, abandon())
    assert sampler._run is not None and sampler._run.done()
    assert isinstance(sampler, ContinuousSampler)
