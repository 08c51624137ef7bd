"""The objective against numbers worked out by hand, and against a second implementation in plain Python.

The toy step has 4 rows of 8 / 4 / 10 / 4 action, 10 / 2 / 0 / 18 environment and 0 / 3 / 0 / 0 warning tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective import objective, world_model_loss, world_model_loss_from_masks
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.forms import policy_surrogate
from backtalk.objective.samples import Sample
from backtalk.trajectory import TokenRole

CONTEXT, TEMPLATE, ACTION, ENV_OUTPUT, WARNING = TokenRole
ACTIONS, ENVS, WARNINGS = (8, 4, 10, 4), (10, 2, 0, 18), (0, 3, 0, 0)
WORLD_NORMALIZERS = ("sequence_mean", "sequence_mean_selected", "token_mean", "fixed_length")
POLICY_NORMALIZERS = ("sequence_mean", "token_mean", "fixed_length")
TARGETS = ("env_only", "warning_only", "warning_plus_env", "full_observation")


def make_sample(roles: list[int], seed: int, *, advantage: float = 0.0, has_reward: bool = True) -> Sample:
    noise = random.Random(seed)
    first = roles.index(ACTION) if ACTION in roles else len(roles)
    return Sample(
        token_ids=torch.tensor([noise.randrange(100) for _ in roles]),
        roles=torch.tensor(roles, dtype=torch.int8),
        turns=torch.tensor([-1 if t < first else 0 for t in range(len(roles))], dtype=torch.int32),
        sampled=torch.tensor([role == ACTION for role in roles]),
        sampling_logprobs=torch.tensor([-noise.random() * 3 if role == ACTION else 0.0 for role in roles]),
        advantage=advantage,
        has_reward=has_reward,
    )


def toy_samples() -> list[Sample]:
    rows = [
        [CONTEXT] * 3 + [TEMPLATE] * 2 + [ACTION] * a + [TEMPLATE] * 2 + [ENV_OUTPUT] * e + [WARNING] * w
        for a, e, w in zip(ACTIONS, ENVS, WARNINGS, strict=True)
    ]
    advantages = (1.5, -0.5, 0.75, -0.5)
    return [
        make_sample(roles, i, advantage=adv, has_reward=i != 3)
        for i, (roles, adv) in enumerate(zip(rows, advantages, strict=True))
    ]


def random_logprobs(samples: list[Sample], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Make log-probabilities of a trainer, near the sampler's on actions, so that some ratios clip and some do not."""
    noise = torch.Generator().manual_seed(seed)
    return [
        torch.where(
            s.roles == ACTION,
            s.sampling_logprobs + 0.3 * torch.randn(len(s), generator=noise),
            -5 * torch.rand(len(s), generator=noise),
        ).to(dtype)
        for s in samples
    ]


def padded(rows: list[Tensor]) -> Tensor:
    """Make a leaf [B, T] whose padding would change results if it were read."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-77.0).clone().requires_grad_()


def plain_python(samples: list[Sample], logprobs: list[Tensor], config: ObjectiveConfig) -> tuple[float, float]:
    """Compute both terms from the formulas with loops over tokens."""
    targets = {
        "env_only": {ENV_OUTPUT}, "warning_only": {WARNING}, "warning_plus_env": {ENV_OUTPUT, WARNING},
        "full_observation": {ENV_OUTPUT, WARNING, TEMPLATE},
    }[config.world_loss_target]  # fmt: skip
    rows = []
    for sample, lps in zip(samples, logprobs, strict=True):
        tokens = list(zip(sample.roles.tolist(), sample.turns.tolist(), lps.tolist(), strict=True))
        surrogates = []
        for (role, _, lp), old in zip(tokens, sample.sampling_logprobs.tolist(), strict=True):
            if role == ACTION:
                r, adv = math.exp(lp - old), sample.advantage
                surrogates.append(-min(r * adv, min(max(r, 1 - config.clip[0]), 1 + config.clip[1]) * adv))
        nll = [-lp for role, turn, lp in tokens if role in targets and (role != TEMPLATE or turn >= 0)]
        observed = len(nll) if TEMPLATE in targets else sum(role in (ENV_OUTPUT, WARNING) for role, _, _ in tokens)
        rows.append((surrogates, nll, observed, sample.has_reward))
    n, length = len(rows), config.max_seq_len or 0
    total_actions, total_targets = sum(len(r[0]) for r in rows), sum(len(r[1]) for r in rows)
    policy = world = 0.0
    for surrogates, nll, observed, has_reward in rows:
        per_policy = {"sequence_mean": n * len(surrogates), "token_mean": total_actions, "fixed_length": n * length}
        per_world = {
            "sequence_mean": n * observed, "sequence_mean_selected": n * len(nll),
            "token_mean": total_targets, "fixed_length": n * length,
        }  # fmt: skip
        if surrogates and has_reward:
            policy += sum(surrogates) / per_policy[config.policy_normalizer]
        if nll and per_world[config.world_normalizer]:
            world += sum(nll) / per_world[config.world_normalizer]
    return policy, world


def test_world_model_loss_is_a_weighted_sum() -> None:
    loss = world_model_loss(torch.tensor([[-9.0, -1.0, -3.0]]), torch.tensor([[0.0, 0.5, 0.5]]))
    assert loss == 2.0  # (1 + 3) / 2


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 2.0, -2.4),  # clipped at 1.2
        (0.5, 2.0, -1.0),  # a good action that became less likely is not clipped
        (0.5, -2.0, 1.6),  # clipped at 0.8
        (1.5, -2.0, 3.0),
        (1.0, 2.0, -2.0),
    ],
)
def test_policy_loss_of_one_token(ratio: float, advantage: float, expected: float) -> None:
    new, old = torch.tensor([[math.log(ratio) - 1]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)
    trained = torch.ones(1, 1, dtype=torch.bool)
    loss = policy_surrogate(new, old, torch.tensor([advantage]), trained, (0.2, 0.2), "clip")
    assert loss.item() == pytest.approx(expected, abs=1e-12)


# Environment tokens of rows 0, 1, 3 cost 1, 2 and 0.5 nats each, warning tokens 3.
@pytest.mark.parametrize(
    ("target", "normalizer", "expected"),
    [
        ("env_only", "sequence_mean", (10 * 1 / 10 + 2 * 2 / 5 + 0 + 18 * 0.5 / 18) / 4),
        ("env_only", "sequence_mean_selected", (1 + 2 + 0 + 0.5) / 4),
        ("env_only", "token_mean", (10 * 1 + 2 * 2 + 18 * 0.5) / 30),
        ("env_only", "fixed_length", (10 * 1 + 2 * 2 + 18 * 0.5) / 50 / 4),
        ("warning_only", "sequence_mean", 3 * 3 / 5 / 4),
        ("warning_only", "sequence_mean_selected", 3 / 4),
        ("warning_only", "token_mean", 3.0),
        ("warning_only", "fixed_length", 9 / 50 / 4),
        ("warning_plus_env", "sequence_mean", (1 + (2 * 2 + 3 * 3) / 5 + 0.5) / 4),
        ("warning_plus_env", "sequence_mean_selected", (1 + (2 * 2 + 3 * 3) / 5 + 0.5) / 4),
        ("warning_plus_env", "token_mean", (10 + 4 + 9 + 9) / 33),
        ("warning_plus_env", "fixed_length", (10 + 4 + 9 + 9) / 50 / 4),
    ],
)
def test_world_term_of_the_toy_step(target: Any, normalizer: Any, expected: float) -> None:
    roles = torch.zeros(4, 20)
    costs = torch.full((4, 20), 99.0, dtype=torch.float64)
    for row, (e, w, cost) in enumerate(zip(ENVS, WARNINGS, (1.0, 2.0, 0.0, 0.5), strict=True)):
        roles[row, 1 : 1 + e], roles[row, 1 + e : 1 + e + w] = ENV_OUTPUT, WARNING
        costs[row, 1 : 1 + e], costs[row, 1 + e : 1 + e + w] = cost, 3.0
    loss = world_model_loss_from_masks(
        -costs, roles == ENV_OUTPUT, roles == WARNING, normalizer=normalizer, target=target, max_seq_len=50
    )
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_unselected_positions_may_hold_anything() -> None:
    logprobs_BT = torch.tensor([[float("nan"), -2.0, -math.inf]], requires_grad=True)
    env_BT = torch.tensor([[False, True, False]])
    loss = world_model_loss_from_masks(logprobs_BT, env_BT, torch.zeros_like(env_BT), normalizer="token_mean")
    loss.backward()
    assert loss.item() == 2.0
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad.tolist() == [[0.0, -1.0, 0.0]]


def test_no_observation_at_all_is_zero() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for normalizer in WORLD_NORMALIZERS:
        loss = world_model_loss_from_masks(
            torch.full((2, 3), -1.0), nothing, nothing, normalizer=normalizer, max_seq_len=3
        )
        assert loss.item() == 0.0


# Published code on the toy step, as measured (per-row means of the environment tokens' nats are COSTS):
#   echo-rl sequence_mean / full_observation_tokens   0.5444     prime-rl            0.9642 on any number of ranks
#   echo-rl sequence_mean / selected_tokens           0.6224     verl token-mean     1.1125 (over action tokens)
#   echo-rl seq_mean_token_sum_norm, L = 26           0.2781     echo-rl token_mean  0.9642, and 0.9493 on two ranks
COSTS = (0.9459, 0.52, 0.0, 1.0237)


@pytest.mark.parametrize(
    ("normalizer", "published"),
    [
        ("sequence_mean", 0.5444),
        ("sequence_mean_selected", 0.6224),  # verl's seq-mean-token-mean is the same
        ("token_mean", 0.9642),
        ("fixed_length", 0.2781),
    ],
)
def test_published_implementations_on_the_toy_step(normalizer: Any, published: float) -> None:
    samples = toy_samples()
    rows = [torch.full((len(s),), -cost, dtype=torch.float64) for s, cost in zip(samples, COSTS, strict=True)]
    config = ObjectiveConfig(world_normalizer=normalizer, max_seq_len=26)
    counts = TokenCounts.of(samples)
    _, terms = objective(padded(rows), collate(samples, 0), counts, config)
    assert terms["world_model_loss"].item() == pytest.approx(published, abs=1e-4)
    ranks = [
        objective(padded(rows[half]), collate(samples[half], 0), counts, config)[1]["world_model_loss"].item()
        for half in (slice(0, 2), slice(2, 4))
    ]
    assert sum(ranks) == pytest.approx(terms["world_model_loss"].item(), abs=1e-12)  # not 0.9493


def echo_rl(nll: Tensor, env: Tensor, warning: Tensor, mode: str, length: int) -> Tensor:
    full = (env + warning).sum(-1).clamp(min=1)
    per_row = {
        "sequence_mean": (nll * env).sum(-1) / full,
        "sequence_mean_selected": (nll * env).sum(-1) / env.sum(-1).clamp(min=1),
        "fixed_length": (nll * env).sum(-1) / length,
    }[mode]
    return per_row.mean()


def prime_rl(nll: Tensor, env: Tensor) -> Tensor:
    return (nll * env).sum() / env.sum()


@pytest.mark.parametrize("normalizer", WORLD_NORMALIZERS)
def test_value_and_gradient_are_those_of_the_published_semantics(normalizer: Any) -> None:
    noise = torch.Generator().manual_seed(3)
    env = torch.rand(6, 40, generator=noise) < 0.4
    warning = (torch.rand(6, 40, generator=noise) < 0.2) & ~env
    env[2] = warning[2] = False
    ours = (-4 * torch.rand(6, 40, generator=noise, dtype=torch.float64)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss = world_model_loss_from_masks(ours, env, warning, normalizer=normalizer, max_seq_len=40)
    masks = env.double(), warning.double()
    published = prime_rl(-theirs, masks[0]) if normalizer == "token_mean" else echo_rl(-theirs, *masks, normalizer, 40)
    loss.backward()
    published.backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(loss, published, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("policy_normalizer", "world_normalizer"), list(itertools.product(POLICY_NORMALIZERS, WORLD_NORMALIZERS))
)
def test_agrees_with_plain_python(policy_normalizer: Any, world_normalizer: Any, target: Any) -> None:
    config = ObjectiveConfig(
        world_model_coeff=0.3, policy_coeff=0.7, clip=(0.1, 0.28), max_seq_len=64,
        policy_normalizer=policy_normalizer, world_normalizer=world_normalizer, world_loss_target=target,
    )  # fmt: skip
    samples = toy_samples()
    rows = random_logprobs(samples)
    total, terms = objective(padded(rows), collate(samples, 0), TokenCounts.of(samples, target), config)
    policy, world = plain_python(samples, rows, config)
    assert terms["policy_loss"].item() == pytest.approx(policy, abs=1e-12)
    assert terms["world_model_loss"].item() == pytest.approx(world, abs=1e-12)
    assert total.item() == pytest.approx(0.7 * policy + 0.3 * world, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    ("policy_normalizer", "world_normalizer"), list(itertools.product(POLICY_NORMALIZERS, WORLD_NORMALIZERS))
)
def test_splitting_a_step_changes_nothing(
    policy_normalizer: Any, world_normalizer: Any, dtype: torch.dtype, tolerance: float
) -> None:
    config = ObjectiveConfig(
        policy_normalizer=policy_normalizer, world_normalizer=world_normalizer, max_seq_len=64, world_model_coeff=0.3
    )
    samples = toy_samples()
    rows = random_logprobs(samples, dtype=dtype)
    counts = TokenCounts.of(samples, config.world_loss_target)

    def split(parts: list[list[int]]) -> tuple[float, list[Tensor]]:
        loss, grads = 0.0, [torch.empty(0)] * len(samples)
        for part in parts:
            logprobs_BT = padded([rows[i] for i in part])
            total, _ = objective(logprobs_BT, collate([samples[i] for i in part], 0), counts, config)
            total.backward()
            loss += total.item()
            assert logprobs_BT.grad is not None
            for row, i in enumerate(part):
                grads[i] = logprobs_BT.grad[row, : len(samples[i])]
                assert not logprobs_BT.grad[row, len(samples[i]) :].any()
        return loss, grads

    whole_loss, whole_grads = split([[0, 1, 2, 3]])
    for parts in ([[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2], [0, 1, 3]]):
        loss, grads = split(parts)
        assert loss == pytest.approx(whole_loss, abs=tolerance)
        for grad, whole in zip(grads, whole_grads, strict=True):
            torch.testing.assert_close(grad, whole, rtol=0, atol=tolerance)


def test_gradient_reaches_target_tokens_alone() -> None:
    samples = toy_samples()
    config = ObjectiveConfig(world_model_coeff=0.05)
    logprobs_BT = padded(random_logprobs(samples))
    batch = collate(samples, 0)
    total, _ = objective(logprobs_BT, batch, TokenCounts.of(samples), config)
    total.backward()
    grad_BT, roles_BT = logprobs_BT.grad, batch.roles_BT
    assert grad_BT is not None
    for role in (CONTEXT, TEMPLATE, WARNING):  # padding is CONTEXT
        assert not grad_BT[roles_BT == role].any()
    for row, (e, w) in enumerate(zip(ENVS, WARNINGS, strict=True)):
        expected = -0.05 / (4 * (e + w)) if e else 0.0
        assert grad_BT[row][roles_BT[row] == ENV_OUTPUT].tolist() == pytest.approx([expected] * e, abs=1e-15)
    assert not grad_BT[3][roles_BT[3] == ACTION].any()  # the row without a reward carries the world term only


def test_coefficient_zero_is_plain_grpo_bit_for_bit() -> None:
    samples = toy_samples()[:3]
    rows = random_logprobs(samples, dtype=torch.float32)
    batch, ours_BT = collate(samples, 0), padded(rows)
    total, terms = objective(ours_BT, batch, TokenCounts.of(samples), ObjectiveConfig(world_model_coeff=0.0))
    total.backward()

    theirs_BT = padded(rows)  # GRPO on its own, without observations
    mask_BT = (batch.roles_BT == ACTION).float()
    ratio_BT = torch.exp((theirs_BT - batch.sampling_logprobs_BT) * mask_BT)
    adv_B1 = batch.advantages_B.unsqueeze(1)
    gain_BT = torch.min(ratio_BT * adv_B1, torch.clamp(ratio_BT, 0.8, 1.2) * adv_B1)
    grpo = -(gain_BT * (mask_BT / (3 * mask_BT.sum(1, keepdim=True)))).sum()
    grpo.backward()
    assert torch.equal(total, grpo)
    assert ours_BT.grad is not None and theirs_BT.grad is not None
    assert torch.equal(ours_BT.grad, theirs_BT.grad)
    _, world = plain_python(samples, rows, ObjectiveConfig())
    assert terms["world_model_loss"].item() == pytest.approx(world, abs=1e-6) and world > 0  # still measured


def test_policy_coefficient_zero_needs_no_reward() -> None:
    samples = toy_samples()
    logprobs_BT = padded(random_logprobs(samples))
    config = ObjectiveConfig(policy_coeff=0.0, world_model_coeff=1.0)
    total, terms = objective(logprobs_BT, collate(samples, 0), TokenCounts.of(samples), config)
    total.backward()
    assert logprobs_BT.grad is not None
    assert not logprobs_BT.grad[collate(samples, 0).roles_BT == ACTION].any()
    assert torch.equal(total, terms["world_model_loss"])


def test_world_gradient_is_the_derivative_of_the_loss() -> None:
    samples = toy_samples()
    batch, counts = collate(samples, 0), TokenCounts.of(samples)
    logprobs_BT = padded(random_logprobs(samples))
    assert torch.autograd.gradcheck(
        lambda x: objective(x, batch, counts, ObjectiveConfig(world_model_coeff=0.3))[0], (logprobs_BT,)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_coeff": -1.0}, "negative"),
        ({"world_model_coeff": math.nan}, "world_model_coeff=nan"),
        ({"policy_coeff": 0.0, "world_model_coeff": 0.0}, "nothing to learn"),
        ({"clip": (1.1, 0.2)}, "eps_low"),
        ({"world_normalizer": "sum"}, "sequence_mean_selected"),
        ({"policy_normalizer": "sequence_mean_selected"}, "fixed_length"),
        ({"world_loss_target": "all"}, "warning_plus_env"),
        ({"world_normalizer": "fixed_length"}, "max_seq_len"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**settings)


def test_bare_masks_know_no_template() -> None:
    mask = torch.tensor([[True]])
    with pytest.raises(ConfigError, match="full_observation"):
        world_model_loss_from_masks(torch.zeros(1, 1), mask, ~mask, normalizer="token_mean", target="full_observation")
