"""The proof of sync by numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from backtalk.engines.server.proof import SyncProof, Uptake, mean_gap, uptake
from backtalk.errors import SamplerFault


def test_uptake_is_the_share_of_the_trainers_change() -> None:
    assert uptake([0.2, -0.4], [0.2, -0.4]) == Uptake(share=1.0, error=0.0)
    stale = uptake([0.0, 0.0, 0.0], [0.2, -0.4, 0.1])
    assert (stale.share, stale.error, stale.decides) == (0.0, 0.0, True)
    # s = (1, 1), n = (1, 0): share 1, left over (0, 1): error sqrt(1 / (2 - 1) / 1) = 1
    noisy = uptake([1.0, 1.0], [1.0, 0.0])
    assert (noisy.share, noisy.error, noisy.decides) == (1.0, 1.0, False)


def test_nothing_can_be_told_without_a_change() -> None:
    assert not uptake([0.1, 0.2], [0.0, 0.0]).decides
    assert not uptake([], []).decides


def test_mean_gap() -> None:
    assert mean_gap([-1.0, -2.0], [-1.5, -2.0]) == 0.25


def test_a_stale_server_is_found_though_the_step_was_small() -> None:
    proof = SyncProof(max_gap=0.001)
    old, new = [-1.0, -2.0, -3.0], [-1.00001, -2.00002, -2.99999]
    assert proof.check(old, old, "s")[0] == 0
    with pytest.raises(SamplerFault, match=r"s is out of sync.* went along with 0%.*--resume"):
        proof.check(old, new, "s")  # a gap of 0.00001 is far below the bound


def test_a_server_in_sync_passes_though_its_kernels_differ() -> None:
    proof = SyncProof(max_gap=0.05)
    noise = random.Random(0)
    offsets = [noise.gauss(0, 0.02) for _ in range(200)]  # of its kernels, the same at each update
    trainer = [-noise.random() for _ in range(200)]
    for _ in range(5):
        server = [x + offset for x, offset in zip(trainer, offsets, strict=True)]
        gap, share = proof.check(server, trainer, "s")
        assert gap == pytest.approx(math.fsum(map(abs, offsets)) / 200)
        trainer = [x + noise.gauss(0, 0.001) for x in trainer]
    assert share == pytest.approx(1)


def test_updates_too_small_to_tell_add_up() -> None:
    proof, noise = SyncProof(max_gap=0.05), random.Random(0)

    def jitter(values: list[float]) -> list[float]:
        return [x + noise.gauss(0, 0.01) for x in values]

    start = [-1.0] * 400
    proof.check(jitter(start), start, "s")
    steps = 0
    with pytest.raises(SamplerFault):
        for steps in range(1, 100):  # it stays where it is, and the trainer moves by 0.002 a step
            gap, share = proof.check(jitter(start), [-1.0 - 0.002 * steps * (-1) ** i for i in range(400)], "s")
            assert math.isnan(share) and gap < 0.05
    assert 3 < steps < 20


def test_a_server_with_half_of_the_weights_is_found() -> None:
    proof = SyncProof(max_gap=0.05)
    proof.check([-1.0] * 10, [-1.0] * 10, "s")
    with pytest.raises(SamplerFault, match="went along with 50%"):
        proof.check([-1.005] * 10, [-1.01] * 10, "s")


def test_another_model_is_refused_at_once() -> None:
    with pytest.raises(SamplerFault, match=r"differ from the trainer's by 0\.5 nats a token.*0\.001 is allowed"):
        SyncProof(max_gap=0.001).check([-1.0, -2.0], [-1.5, -2.5], "s")
    with pytest.raises(SamplerFault):
        SyncProof(max_gap=0.001).check([math.nan, -2.0], [-1.5, -2.5], "s")
