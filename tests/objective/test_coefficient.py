"""A share of the gradient as the coefficient: the controller, worked out by hand, and gradients over several ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backtalk.errors import ConfigError
from backtalk.objective.coefficient import CoefficientController, Schedule, Share
from backtalk.objective.config import ObjectiveConfig, WorldOptions
from backtalk.objective.gradients import TermGradients, term_gradients


def controller(*norms: tuple[float, float]) -> CoefficientController:
    made = CoefficientController()
    for policy_norm, world_norm in norms:
        made.observe(policy_norm, world_norm)
    return made


def test_the_first_norms_give_the_share_at_once() -> None:
    fifth = Share(0.2)
    coeff = controller((0.3, 6.0)).coefficient(fifth, 0)
    assert coeff == pytest.approx(0.25 * 0.3 / 6.0)
    assert TermGradients(policy_norm=0.3, world_norm=6.0, cosine=0.0).world_share(coeff) == pytest.approx(0.2)
    assert controller((0.3, 6.0)).coefficient(Share(0.5), 0) == pytest.approx(0.05)


def test_norms_are_geometric_means_that_forget() -> None:
    """Observe policy norms 1 and 8 at a world norm of 4: log 2 (0 * 0.8 + 3 * 1) / 1.8 = 5/3 binary digits."""
    assert controller((1, 4), (8, 4)).coefficient(Share(0.5), 0) == pytest.approx(2 ** (5 / 3) / 4)


def test_a_step_without_a_gradient_keeps_the_running_norm() -> None:
    before = controller((0.3, 6.0))
    before.observe(0.0, 3.0)  # equal rewards: no policy gradient
    assert before.coefficient(Share(0.5), 1) == pytest.approx(0.3 / (6 * 2 ** (-1 / 1.8)))
    for nothing in (0.0, math.nan, math.inf):
        same = controller((0.3, 6.0))
        same.observe(nothing, nothing)
        assert same.coefficient(Share(0.5), 1) == controller((0.3, 6.0)).coefficient(Share(0.5), 1)


def test_the_coefficient_is_bounded_and_starts_as_told() -> None:
    assert controller().coefficient(Share(0.2), 0) == 0.05
    assert controller((0, 6.0)).coefficient(Share(0.2, initial=0.01), 0) == 0.01
    assert controller().coefficient(Share(0.2, max=0.02), 0) == 0.02
    assert controller((1.0, 1e-9)).coefficient(Share(0.2), 0) == 1.0
    assert controller((1e-9, 1.0)).coefficient(Share(0.2, min=0.001), 0) == 0.001


def test_a_share_may_be_a_schedule() -> None:
    share = Share(Schedule({0: 0.5, 10: 0.0}))
    norms = controller((0.3, 6.0))
    assert [norms.coefficient(share, step) for step in (0, 5, 10, 99)] == pytest.approx([0.05, 0.05 / 3, 0.0, 0.0])
    assert controller().coefficient(share, 10) == 0.0
    config = ObjectiveConfig(world_model_coeff=share)
    assert config.at(5) == config
    assert [config.has_world_term(step) for step in (0, 9, 10)] == [True, True, False]


def test_the_state_goes_through_json_to_the_bit() -> None:
    first, second = controller((0.3, 6.0), (0.1, 5.9)), CoefficientController()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for norms in (first, second):
        norms.observe(0.07, 5.1)
    assert first.coefficient(Share(0.2), 3) == second.coefficient(Share(0.2), 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Share(1.0), "leaves nothing to the policy term"),
        (lambda: Share(-0.1), "0 <= share < 1"),
        (lambda: Share(math.nan), "0 <= share < 1"),
        (lambda: Share(Schedule({0: 0.5, 9: 2.0})), "share=2.0"),
        (lambda: Share(0.2, min=0.1, max=0.01), "min=0.1, max=0.01"),
        (lambda: Share(0.2, initial=-1.0), "initial=-1.0"),
        (lambda: ObjectiveConfig(policy_coeff=0.0, world_model_coeff=Share(0.2)), "use a number"),
        (lambda: ObjectiveConfig(world_model_coeff=Share(0.2)).world_coeff, "measure_gradients_every"),
    ],
)
def test_a_share_that_cannot_work_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_norms_and_cosine_by_hand() -> None:
    """Take the gradients (3, 0 | 4) and (0, 5 | 12), and weights that only one term reaches."""
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])
    c, d = torch.tensor([0.0, 5.0]), torch.tensor([[12.0]])
    assert term_gradients([a, b], [c, d]) == TermGradients(policy_norm=5.0, world_norm=13.0, cosine=48 / 65)
    assert term_gradients([a, None], [None, d]) == TermGradients(policy_norm=3.0, world_norm=12.0, cosine=0.0)
    nothing = term_gradients([None], [b])
    assert nothing.world_share(0.5) == 1.0 and math.isnan(nothing.cosine)
    assert math.isnan(nothing.world_share(0.0))


WEIGHTS_MN = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], dtype=torch.float64)
ROWS_BN = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 2.0], [2.0, 1.0, -1.0], [4.0, 0.0, 1.0]], dtype=torch.float64)


def losses(weights_MN: Tensor, bias_M: Tensor, rows_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return two losses that are sums over rows, as both terms are."""
    out_BM = rows_BN @ weights_MN.T + bias_M
    return out_BM.square().sum() / 4, (out_BM.sin().sum() / 4)


def gradients(rows_BN: Tensor) -> list[list[Tensor]]:
    weights = [WEIGHTS_MN.clone().requires_grad_(), torch.ones(2, dtype=torch.float64, requires_grad=True)]
    terms = losses(*weights, rows_BN)
    return [list(torch.autograd.grad(term, weights, retain_graph=True)) for term in terms]


def rank_main(rank: int, folder: str) -> None:
    """Hold half of the rows; then, with the whole step's gradients, one of the two weights."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def summed(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    policy, world = ([summed(grad) for grad in term] for term in gradients(ROWS_BN[2 * rank : 2 * rank + 2]))
    replicated = term_gradients(policy, world)
    sharded = term_gradients(policy[rank : rank + 1], world[rank : rank + 1], reduce=summed)
    norms = CoefficientController()
    norms.observe(replicated.policy_norm, replicated.world_norm)
    result = [[t.policy_norm, t.world_norm, t.cosine] for t in (replicated, sharded)]
    (Path(folder) / f"{rank}.json").write_text(json.dumps([*result, norms.coefficient(Share(0.02), 0)]))
    dist.destroy_process_group()


def test_two_ranks_find_what_one_process_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    alone = term_gradients(*gradients(ROWS_BN))
    assert alone.policy_norm > 0.1 and 0.01 < abs(alone.cosine) < 0.99
    expected = [alone.policy_norm, alone.world_norm, alone.cosine]
    for rank in range(2):
        replicated, sharded, coeff = json.loads((tmp_path / f"{rank}.json").read_text())
        assert replicated == pytest.approx(expected, rel=1e-12)
        assert sharded == pytest.approx(expected, rel=1e-12)
        assert coeff == pytest.approx(alone.policy_norm / 49 / alone.world_norm, rel=1e-12)


def test_a_cosine_goes_half_way_at_half_time_and_is_flat_at_its_ends() -> None:
    schedule = Schedule({0: 0.2, 40: 0.0, 60: 0.1}, "cosine")
    # (1 + cos(pi/4)) / 2 = 0.853553 of the way is left after a quarter of the time
    assert [schedule.at(n) for n in (0, 10, 20, 40, 50, 60, 99)] == pytest.approx(
        [0.2, 0.2 * 0.853553, 0.1, 0.0, 0.05, 0.1, 0.1], abs=1e-6
    )


def test_a_term_in_every_fourth_step_is_in_no_other() -> None:
    config = ObjectiveConfig(world_model_coeff=Share(0.2), world=WorldOptions(every=4))
    assert [config.at(step).world_model_coeff for step in range(5)] == [0.0, 0.0, 0.0, Share(0.2), 0.0]
    assert [config.has_world_term(step) for step in range(5)] == [False, False, False, True, False]
    assert config.at(2).at(3).world_model_coeff == 0.0  # an engine asks again
    with pytest.raises(ConfigError, match="leaves other steps nothing to learn"):
        ObjectiveConfig(policy_coeff=0.0, world=WorldOptions(every=2))
