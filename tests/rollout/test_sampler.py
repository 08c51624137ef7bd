"""The scripted policy says what it was told, cut where the limit is."""

from __future__ import annotations

import pytest

from backtalk.rollout.sampler import Completion, SamplingParams, ScriptedSampler


def encode(text: str) -> tuple[int, ...]:
    return (*text.encode(), 0)


async def test_replies_come_in_order_and_the_last_one_repeats() -> None:
    sampler = ScriptedSampler(["a", "bc"], encode)
    async with sampler.session("x") as session:
        said = [await session.sample([1, 2, 3]) for _ in range(3)]
    assert said == [
        Completion((97, 0), None, True),
        Completion((98, 99, 0), None, True),
        Completion((98, 99, 0), None, True),
    ]


async def test_every_session_starts_anew_and_its_key_may_choose() -> None:
    sampler = ScriptedSampler(lambda key: [key, "later"], encode)
    async with sampler.session("k") as one, sampler.session("l") as other:
        assert (await one.sample([])).token_ids == encode("k")
        assert (await other.sample([])).token_ids == encode("l")
        assert (await one.sample([])).token_ids == encode("later")


@pytest.mark.parametrize(
    ("limit", "expected", "stopped"), [(3, (97, 98, 0), True), (2, (97, 98), False), (0, (), False)]
)
async def test_a_limit_cuts(limit: int, expected: tuple[int, ...], stopped: bool) -> None:
    async with ScriptedSampler(["ab"], encode, logprob=-0.5).session("x") as session:
        completion = await session.sample([], max_tokens=limit)
    assert completion == Completion(expected, (-0.5,) * len(expected), stopped)


async def test_nothing_to_say_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one reply"):
        async with ScriptedSampler([], encode).session("x"):
            pass


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"max_tokens": 0}])
def test_sampling_params_check_themselves(wrong: dict) -> None:
    with pytest.raises(ValueError, match="need >= 0 and >= 1"):
        SamplingParams(**wrong)
