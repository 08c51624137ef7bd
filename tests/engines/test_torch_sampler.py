"""The batched sampler against plain forward passes, transformers' own `generate`, and numbers worked by hand."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from backtalk.engines.torch.draws import sample_tokens, uniform_numbers
from backtalk.engines.torch.kv import History, PersistentKVCache, _row_groups
from backtalk.engines.torch.sampler import TorchSampler
from backtalk.errors import ConfigError, SamplerError
from backtalk.rollout.sampler import Completion, SamplingParams
from sampler_play import SMALL, VOCAB, cancel_amid_actions, forced_logprobs, ids_of, play, sharpen, tokens

UNIFORMS = [0.15340020673323762, 0.9534382869615645, 0.20250969742077318]


def sampler_of(model: Any, stop_token_ids: Sequence[int] = tuple(range(9)), **settings) -> TorchSampler:
    params = SamplingParams(
        max_tokens=settings.pop("max_tokens", 14),
        temperature=settings.pop("temperature", 1.0),
        seed=settings.pop("seed", 0),
    )
    return TorchSampler(model, params=params, stop_token_ids=stop_token_ids, pad_token_id=0, **settings)


@pytest.mark.parametrize("name", ["qwen", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("persistent", "temperature"), [(True, 1.0), (True, 0.7), (False, 1.0)])
async def test_logprobs_are_those_of_a_plain_forward_pass(
    name: str, attention: str, persistent: bool, temperature: float, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    model.set_attn_implementation(attention)
    sampler = sampler_of(model, persistent_cache=persistent, temperature=temperature)
    lengths = set()

    def check(history: list[int], completion: Completion) -> None:
        count = len(completion.token_ids)
        expected = forced_logprobs(model, history, count, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
        lengths.add(count)

    await play(sampler, rows=8, check=check)
    model.set_attn_implementation("sdpa")
    assert len(lengths) > 4  # rows did end at different times
    assert sampler.stats.decode_rows < 8 * sampler.stats.decode_steps  # and the batch shrank
    assert (sampler.stats.kv.reused_tokens > 0) is persistent
    assert (sampler.stats.kv.shared_tokens > 0) is persistent


async def test_keeping_the_cache_changes_nothing(qwen: Any) -> None:
    kept = await play(sampler_of(qwen, persistent_cache=True))
    anew = await play(sampler_of(qwen, persistent_cache=False))
    assert ids_of(kept) == ids_of(anew)


@pytest.mark.parametrize("persistent", [True, False])
async def test_running_ahead_of_what_is_read_changes_nothing(qwen: Any, persistent: bool) -> None:
    """A GPU runs the next token before this one is looked at; so does the CPU here."""
    ahead = sampler_of(qwen, persistent_cache=persistent)
    ahead._worker._runs_ahead = True
    seen = ids_of(await play(ahead))
    behind = sampler_of(qwen, persistent_cache=persistent)
    assert seen == ids_of(await play(behind))
    assert ahead.stats.action_tokens == behind.stats.action_tokens
    assert behind.stats.decode_rows < ahead.stats.decode_rows <= 2 * behind.stats.decode_rows


async def test_arrival_order_and_neighbours_change_nothing(qwen: Any) -> None:
    together = await play(sampler_of(qwen))
    reversed_arrival = await play(sampler_of(qwen), delay_s=lambda row: 0.002 * (6 - row))
    assert reversed_arrival == together  # to the last bit: the same waves
    fewer = await play(sampler_of(qwen), rows=3)
    assert ids_of(fewer) == {key: ids for key, ids in ids_of(together).items() if key in fewer}


async def test_greedy_is_generate(qwen: Any) -> None:
    sampler = sampler_of(qwen, temperature=0.0, max_tokens=20)
    rng = random.Random(5)
    async with sampler.session("a") as session:
        history = tokens(rng, 10, 10)
        for _ in range(3):
            completion = await session.sample(history)
            expected = qwen.generate(
                torch.tensor([history]),
                attention_mask=torch.ones(1, len(history), dtype=torch.long),
                do_sample=False,
                max_new_tokens=20,
                eos_token_id=list(range(9)),
                pad_token_id=0,
            )[0, len(history) :].tolist()
            assert list(completion.token_ids) == expected
            history = history + expected
            logprobs = forced_logprobs(qwen, history, len(expected), 1.0)  # at temperature 1
            torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, atol=1e-4, rtol=0)
            history += tokens(rng, 5, 9)


async def test_stop_token_is_kept_and_a_limit_cuts(qwen: Any) -> None:
    async with sampler_of(qwen, stop_token_ids=range(1000)).session("a") as session:
        stopped = await session.sample([1, 2, 3])
    async with sampler_of(qwen, stop_token_ids=[], max_tokens=6).session("a") as session:
        cut = await session.sample([1, 2, 3])
        cut_shorter = await session.sample([1, 2, 3], max_tokens=4)
        not_raised = await session.sample([1, 2, 3], max_tokens=60)
    assert (len(stopped.token_ids), stopped.stopped) == (1, True)
    assert [(len(c.token_ids), c.stopped) for c in (cut, cut_shorter, not_raised)] == [
        (6, False),
        (4, False),
        (6, False),
    ]


async def test_a_watched_session_stops_where_it_is_told_and_keeps_its_cache(qwen: Any) -> None:
    async def play_two(watched: bool) -> tuple[list[Completion], Completion, TorchSampler]:
        sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=9)
        seen: list[int] = []

        def is_over(token: int) -> bool:
            seen.append(token)
            return len(seen) == 4

        async with sampler.session("a") as one, sampler.session("b") as other:
            first = one.sample_watched([1, 2, 3], None, is_over) if watched else one.sample([1, 2, 3])
            both = list(await asyncio.gather(first, other.sample([4, 5])))
            if watched:
                assert tuple(seen) == both[0].token_ids  # every token of its own row, and none after the end
            history = [1, 2, 3, *both[0].token_ids[:3], 6]  # the fourth token is dropped
            last, _ = await asyncio.gather(one.sample(history), other.sample([4, 5, *both[1].token_ids]))
        return both, last, sampler

    (short, beside), last, sampler = await play_two(True)
    (long, alone), expected, _ = await play_two(False)
    assert (short.token_ids, short.stopped, len(long.token_ids)) == (long.token_ids[:4], False, 9)
    assert (beside.token_ids, last.token_ids) == (alone.token_ids, expected.token_ids)
    assert sampler.stats.kv.rewritten_histories == 0  # what was kept is what the cache holds
    assert sampler.stats.kv.reused_tokens == (3 + 3) + (2 + 8)


async def test_key_seed_and_call_each_change_the_draw(qwen: Any) -> None:
    draws = []
    for key, seed, calls in (("a", 0, 2), ("b", 0, 1), ("a", 1, 1)):
        async with sampler_of(qwen, stop_token_ids=[], seed=seed).session(key) as session:
            draws += [(await session.sample([1, 2, 3])).token_ids for _ in range(calls)]
    assert len(set(draws)) == 4


def test_random_numbers_stay_the_same_on_every_machine() -> None:
    assert uniform_numbers(7, "step3/triage-1/0", 2, 3) == pytest.approx(UNIFORMS, abs=1e-15)
    assert uniform_numbers(7, "step3/triage-1/0", 2, 1) == pytest.approx(UNIFORMS[:1], abs=1e-15)  # whatever the limit


def test_sampling_inverts_the_distribution() -> None:
    logits = torch.tensor([0.2, 0.3, 0.5]).log().repeat(4, 1)
    ids, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.19, 0.21, 0.51], dtype=torch.float64), 1.0)
    assert ids.tolist() == [0, 0, 1, 2]
    assert logprobs.exp().tolist() == pytest.approx([0.2, 0.2, 0.3, 0.5])
    # At temperature 1/2 the odds are squared: 4/38, 9/38, 25/38.
    ids, logprobs = sample_tokens(logits, torch.tensor([0.10, 0.11, 0.34, 0.35], dtype=torch.float64), 0.5)
    assert ids.tolist() == [0, 1, 1, 2]
    assert logprobs.exp().tolist() == pytest.approx([4 / 38, 9 / 38, 9 / 38, 25 / 38])
    ids, logprobs = sample_tokens(logits[:1], torch.zeros(1, dtype=torch.float64), 0.0)
    assert (ids.item(), logprobs.exp().item()) == (2, pytest.approx(0.5))


def test_sampling_never_takes_what_has_no_probability() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    ids, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert ids.tolist() == [1, 3, 3]
    assert logprobs.isfinite().all()


def test_sampling_over_a_grid_gives_the_exact_frequencies() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.25, 0.05, 0.6])
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ids, _ = sample_tokens(probabilities.log().repeat(1000, 1), grid, 1.0)
    assert ids.bincount(minlength=5).tolist() == [100, 0, 250, 50, 600]


async def test_a_rewritten_history_is_run_again_and_counted(qwen: Any) -> None:
    sampler = sampler_of(qwen)
    async with sampler.session("a") as session:
        first = await session.sample([5, 6, 7, 8, 9])
        history = [5, 6, 70, 8, 9, *first.token_ids, 40]
        second = await session.sample(history)
        third = await session.sample(history[:2])
    assert sampler.stats.kv.rewritten_histories == 2
    for start, completion in ((history, second), (history[:2], third)):
        expected = forced_logprobs(qwen, start + list(completion.token_ids), len(completion.token_ids), 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


async def test_sliding_windows_fall_back_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = sharpen(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)))
    with caplog.at_level(logging.WARNING):
        sampler = sampler_of(model)

        def check(history: list[int], completion: Completion) -> None:
            expected = forced_logprobs(model, history, len(completion.token_ids), 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)

        await play(sampler, check=check)
    assert [r.message for r in caplog.records if "full attention" in r.message] == [
        "MistralForCausalLM runs whole histories again on every turn: "
        "it has layers that are not full attention (DynamicSlidingWindowLayer)"
    ]
    assert sampler.stats.kv.reused_tokens == 0


def test_long_rows_are_run_in_parts(llama: Any) -> None:
    rng = random.Random(3)
    histories = [History(row, tuple(tokens(rng, length, length))) for row, length in enumerate((150, 3, 40, 41))]
    cache = PersistentKVCache(llama, 0, torch.device("cpu"), max_tokens=64, max_padding=8)
    with torch.inference_mode():
        order, logits = cache.begin(histories)
        longer = [History(h.owner, h.token_ids + tuple(tokens(rng, 70, 140))) for h in histories]
        cache.end(histories)
        order_2, logits_2 = cache.begin(longer)
    assert sorted(order) == sorted(order_2) == [0, 1, 2, 3]
    for batch, places, found in ((histories, order, logits), (longer, order_2, logits_2)):
        for row, place in enumerate(places):
            with torch.no_grad():
                expected = llama(torch.tensor([batch[place].token_ids])).logits[0, -1]
            torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=0)


def test_rows_are_grouped_with_little_padding() -> None:
    assert _row_groups([10, 10, 9, 4, 4], max_tokens=100, max_padding=2) == [slice(0, 3), slice(3, 5)]
    assert _row_groups([10, 10, 10], max_tokens=20, max_padding=2) == [slice(0, 2), slice(2, 3)]
    assert _row_groups([90, 1], max_tokens=20, max_padding=200) == [slice(0, 1), slice(1, 2)]


async def test_bfloat16(llama: Any) -> None:
    model: Any = LlamaForCausalLM(llama.config)
    model = model.to(torch.bfloat16).eval()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        for done in (await play(sampler_of(model))).values():
            assert all(-50 < lp <= 0 for completion in done for lp in completion.logprobs)
    model.set_attn_implementation("sdpa")


async def test_the_loop_stays_free_and_training_mode_comes_back(qwen: Any) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticker = asyncio.create_task(tick())
    qwen.train()
    await play(sampler_of(qwen))
    assert qwen.training
    qwen.eval()
    ticker.cancel()
    assert ticks > 5


async def test_a_closing_session_lets_the_others_go(qwen: Any) -> None:
    sampler = sampler_of(qwen)
    async with asyncio.timeout(20), sampler.session("a") as first:
        async with sampler.session("b"):
            waiting = asyncio.create_task(first.sample([1, 2, 3]))
            await asyncio.sleep(0.02)
            assert not waiting.done()  # b may still ask
        assert (await waiting).token_ids
    assert sampler.stats.waves == 1


async def test_cancelling_a_waiter_leaves_the_others_whole(qwen: Any) -> None:
    sampler = sampler_of(qwen)

    async def ask(key: str) -> Completion:
        async with sampler.session(key) as session:
            return await session.sample([1, 2, 3])

    async with asyncio.timeout(20), sampler.session("late") as late:
        tasks = [asyncio.create_task(ask(key)) for key in "abc"]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        answer = await late.sample([1, 2])
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, Completion) for result in (answer, *results[1:]))
    assert (sampler.stats.waves, sampler.stats.calls) == (1, 3)


async def test_cancelling_in_the_middle_of_a_wave(qwen: Any) -> None:
    sampler = sampler_of(qwen, stop_token_ids=[], max_tokens=200)
    async with asyncio.timeout(30), sampler.session("a") as a, sampler.session("b") as b:
        tasks = [asyncio.create_task(session.sample([1, 2, 3])) for session in (a, b)]
        await asyncio.sleep(0.02)  # the wave is under way
        tasks[0].cancel()
        assert len((await tasks[1]).token_ids) == 200
        again = await asyncio.gather(a.sample([1, 2, 3], 5), b.sample([1, 2, 3], 5))
        assert [len(completion.token_ids) for completion in again] == [5, 5]


async def test_when_the_last_session_has_closed_the_model_is_at_rest_and_may_change() -> None:
    """Rollouts are cancelled amid a wave, which then ends; the sampler has no keys left of the weights before."""
    torch.manual_seed(1)
    model = sharpen(LlamaForCausalLM(LlamaConfig(**SMALL))).train()
    sampler = sampler_of(model, stop_token_ids=[], max_tokens=500)
    await cancel_amid_actions(sampler)
    assert model.training  # the worker thread has put it back
    assert sampler.stats.decode_steps < 499
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    async with sampler.session("a") as session:
        completion = await session.sample([1, 2, 3], 20)
    model.eval()
    expected = forced_logprobs(model, [1, 2, 3, *completion.token_ids], 20, 1.0)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


async def test_a_failed_wave_fails_all_its_waiters_and_nothing_else(llama: Any) -> None:
    sampler = sampler_of(llama)

    async def ask(key: str, token: int) -> list[Completion | BaseException]:
        async with sampler.session(key) as session:
            one = await asyncio.gather(session.sample([token, 2]), return_exceptions=True)
            return [*one, await session.sample([1, 2])]

    async with asyncio.timeout(20):
        results = await asyncio.gather(ask("a", 1), ask("b", VOCAB + 1))  # no such token
    for failed, fine in results:
        assert isinstance(failed, SamplerError)
        assert "sampling 2 rows failed" in str(failed)
        assert isinstance(fine, Completion)


async def test_broken_weights_are_an_error_not_a_sample() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    async with sampler_of(model).session("a") as session:
        with pytest.raises(SamplerError, match="not finite"):
            await session.sample([1, 2])


def test_models_without_attention_are_refused() -> None:
    small: Any = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    with pytest.raises(ConfigError, match="RwkvForCausalLM has no attention layer"):
        sampler_of(RwkvForCausalLM(RwkvConfig(**small)))
    with pytest.raises(ConfigError, match="MambaForCausalLM has no attention layer"):
        sampler_of(MambaForCausalLM(MambaConfig(**small)))


async def test_misuse_is_named(qwen: Any) -> None:
    sampler = sampler_of(qwen)
    with pytest.raises(ConfigError, match="is not open"):
        await sampler.session("a").sample([1])
    async with sampler.session("a") as session:
        with pytest.raises(ConfigError, match="already open"):
            await sampler.session("a").__aenter__()
        with pytest.raises(ConfigError, match="room"):
            await session.sample([])
        with pytest.raises(ConfigError, match="room"):
            await session.sample([1], max_tokens=0)
        both = await asyncio.gather(session.sample([1]), session.sample([1]), return_exceptions=True)
    assert isinstance(both[0], Completion)
    assert isinstance(both[1], ConfigError)


async def test_the_last_session_frees_the_cache(qwen: Any) -> None:
    sampler = sampler_of(qwen)
    await play(sampler)
    await asyncio.sleep(0)
    cache = sampler._worker.cache
    assert isinstance(cache, PersistentKVCache)
    assert not cache._buffers()
