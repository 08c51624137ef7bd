"""The SkyRL host without a GPU: SkyRL's own batches, advantages, losses, workers and loop on real local Ray.

The rollouts are sampled over HTTP from a small real model by SkyRL's own client. `scripts/skyrl test` makes the
environment that these tests need.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

pytest.importorskip("skyrl", reason="SkyRL is not installed; type: scripts/skyrl test")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from skyrl.backends.skyrl_train.inference_servers.engine_utils import get_sampling_params_for_backend
    from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    from skyrl.backends.skyrl_train.workers.worker_dispatch import WorkerDispatch
    from skyrl.backends.skyrl_train.workers.worker_utils import BaseBatchIterator, TokenBasedBatchIterator
    from skyrl.train.config import AlgorithmConfig, SamplingParams, SkyRLTrainConfig
    from skyrl.train.generators.base import TrajectoryID
    from skyrl.train.generators.utils import prepare_generator_input
    from skyrl.train.trainer import RayPPOTrainer
    from skyrl.train.utils.trainer_utils import validate_generator_output
    from skyrl_loopback import Loopback, serve

    from backtalk.hosts.skyrl import EchoExperiment, EchoTrainer, RolloutGenerator, TaskPrompts, echo_config
    from backtalk.hosts.skyrl.conformance import SkyRLUnderTest, start_ray
    from backtalk.hosts.skyrl.loss import LOSSES, PREFIX, register_losses, world_loss
    from backtalk.hosts.skyrl.rows import SAMPLES, fill_mini_batches
    from backtalk.hosts.skyrl.smoke import SmokeTrainer
    from backtalk.hosts.skyrl.support import check_trainer

from backtalk.engines.conformance import CHECKS, Outcome, conformance, write_table_model
from backtalk.envs.terminal import TerminalConfig, TerminalWorld
from backtalk.errors import ConfigError, InfrastructureError
from backtalk.language.tokenizer import model_location
from backtalk.objective.advantages import group_advantages
from backtalk.objective.batch import TokenCounts, collate
from backtalk.objective.coefficient import Share
from backtalk.objective.config import ObjectiveConfig, PolicyOptions, WorldOptions
from backtalk.objective.loss import objective as objective_loss
from backtalk.objective.samples import Sample, build_samples
from backtalk.rollout.limits import RolloutLimits
from backtalk.run.config import load_config
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.pool import PooledBackend
from backtalk.tasks.load import load_tasks
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import Failure, Segment, StopReason, TokenRole, Trajectory, TrajectoryGroup

pytestmark = pytest.mark.filterwarnings("ignore")  # of SkyRL, Ray and what they import

C, T, A, E, W = TokenRole.CONTEXT, TokenRole.TEMPLATE, TokenRole.ACTION, TokenRole.ENV_OUTPUT, TokenRole.WARNING
BASE = model_location("base")


@pytest.fixture(autouse=True)
def losses() -> None:
    register_losses()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def suite_trainer(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> SkyRLUnderTest:
    """The suite's trainer, whose workers the other tests use too."""
    return SkyRLUnderTest(write_table_model(tmp_path_factory.mktemp("table") / "model"))


# The loss.


def test_skyrl_passes_the_conformance_suite(suite_trainer: SkyRLUnderTest) -> None:
    """The workers know of the loss through SkyRL's registry alone."""
    results = list(conformance(lambda folder: suite_trainer))
    assert len(results) == len(CHECKS)
    assert [r for r in results if r.outcome is not Outcome.PASSED] == []


def test_the_world_model_term_by_hand() -> None:
    """0.5 * 2 + 0.25 * 3; the action, and a positive number outside the mask, are not read."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -7.0]], requires_grad=True)
    advantages = torch.tensor([[-9.0, -0.5, -0.25, 0.6]])
    loss = world_loss(logprobs, advantages, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    loss.backward()
    assert float(loss.detach()) == 1.75
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, -0.5, -0.25, 0.0]]


def tensors(rows: int = 5, tokens: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = {
        name: torch.randn(rows, tokens, generator=generator) for name in ("log_probs", "old", "rollout", "advantages")
    }
    mask = (torch.rand(rows, tokens, generator=generator) < 0.5).float()
    logs = {name: -draw[name].abs() for name in ("log_probs", "old", "rollout")}
    return {**logs, "advantages": draw["advantages"] * 0.1, "mask": mask}


@pytest.mark.parametrize("name", LOSSES)
def test_without_weights_each_loss_is_skyrls_own_to_the_bit(name: str) -> None:
    """And its gradient, with the numbers that a coefficient of 0 writes outside the mask."""
    found = []
    for kind in (PREFIX + name, name):
        t = tensors()
        logprobs = t["log_probs"].clone().requires_grad_()
        advantages = t["advantages"] if kind == name else t["advantages"] * t["mask"]
        torch.manual_seed(0)  # clip_cov draws tokens
        config = AlgorithmConfig(policy_loss_type=kind)
        loss, metrics = PolicyLossRegistry.get(kind)(logprobs, t["old"], advantages, config, t["mask"], t["rollout"])
        loss.backward()
        found.append((loss.detach(), logprobs.grad, metrics))
    (ours, gradient, metrics), (own, own_gradient, own_metrics) = found
    assert torch.equal(ours, own) and torch.equal(gradient, own_gradient)
    assert metrics.pop("world_loss") == 0.0 and metrics == pytest.approx(own_metrics)


@pytest.mark.parametrize("name", LOSSES)
def test_with_weights_each_loss_adds_them_and_changes_no_action(name: str) -> None:
    t = tensors()
    weights = torch.rand(t["mask"].shape, generator=torch.Generator().manual_seed(1)) * (1 - t["mask"])
    gradients = []
    for channel in (t["advantages"] * t["mask"], torch.where(t["mask"] > 0, t["advantages"], -weights)):
        logprobs = t["log_probs"].clone().requires_grad_()
        torch.manual_seed(0)
        config = AlgorithmConfig(policy_loss_type=PREFIX + name)
        loss, _ = PolicyLossRegistry.get(PREFIX + name)(logprobs, t["old"], channel, config, t["mask"], t["rollout"])
        loss.backward()
        gradients.append(logprobs.grad)
    assert torch.equal(gradients[1] - gradients[0], -weights)


def test_a_loss_without_a_mask_is_refused() -> None:
    t = tensors()
    with pytest.raises(ConfigError, match="without a loss_mask"):
        PolicyLossRegistry.get("backtalk_regular")(t["log_probs"], t["old"], t["advantages"], AlgorithmConfig())


# Rows that SkyRL makes up.


def table_batch(rows: int, tokens: int = 4) -> TrainingInputBatch:
    """A batch whose observations have weights 0.5, 1.5, ... by row."""
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).repeat(rows, 1)
    channel = torch.where(mask > 0, 0.1, -(torch.arange(rows)[:, None] + 0.5))
    batch = TrainingInputBatch(
        {
            "sequences": torch.randint(2, 50, (rows, tokens + 2)),
            "attention_mask": torch.ones(rows, tokens + 2, dtype=torch.int64),
            "response_mask": torch.ones(rows, tokens, dtype=torch.int64),
            "loss_mask": mask,
            "advantages": channel,
            "action_log_probs": torch.full((rows, tokens), -1.0),
        }
    )
    batch.metadata = {"response_length": tokens}
    return batch


def test_micro_batches_that_skyrl_makes_up_add_nothing() -> None:
    """They are made where a process has fewer micro-batches by tokens than another; their advantages are positive."""
    iterator = TokenBasedBatchIterator(table_batch(2), max_tokens_per_microbatch=100)
    made_up = iterator._create_padding_microbatch()
    experience = BaseBatchIterator.batch_to_experience(made_up)
    assert float(experience.advantages.min()) > 0 and float(experience.loss_mask.sum()) == 0
    logprobs = torch.full(experience.advantages.shape, -1.0, requires_grad=True)
    loss = world_loss(logprobs, experience.advantages, experience.loss_mask)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not bool(logprobs.grad.any())


def test_rows_that_skyrl_copies_would_count_twice_so_mini_batches_are_filled_up(local_ray: None) -> None:
    """Three rows on two processes: SkyRL copies the first with its weights. Filled up by us, it has nothing to copy."""
    from skyrl.backends.skyrl_train.distributed.dispatch import MeshDispatch

    batch = table_batch(3)
    chunks = ray.get(MeshDispatch.stage_chunks(2, batch, [(0, 3)])[0])
    copied = torch.cat([chunk["advantages"] for chunk in chunks])
    assert copied[:, 2].tolist() == [-0.5, -1.5, -2.5, -0.5]

    output = {
        "prompt_token_ids": [[1], [2], [3]],
        "response_ids": [[1, 2], [3, 4], [5, 6]],
        "rewards": [[0.0, 1.0]] * 3,
        "loss_masks": [[1, 0]] * 3,
        "rollout_logprobs": [[-1.0, 0.0]] * 3,
        "is_last_step": [True, False, True],
        "stop_reasons": ["a", "b", "b"],
        SAMPLES: ["x", "y", "z"],
    }
    filled, uids = fill_mini_batches(output, ["p", "q", "q"], prompts=2, multiple=2, pad_token_id=0)
    assert uids == ["p", "q", "q", "q"]
    assert filled["is_last_step"] == [True, False, False, True]  # the last row of a rollout stays its last
    assert filled[SAMPLES] == ["x", "y", None, "z"]
    assert filled["loss_masks"][2] == [0] and filled["response_ids"][2] == [0] and filled["stop_reasons"][2] == "b"
    assert filled["response_ids"][3] == [5, 6]
    by_one, _ = fill_mini_batches(output, ["p", "q", "q"], prompts=1, multiple=2, pad_token_id=0)
    assert by_one[SAMPLES] == [None, "x", "y", "z"]


# Batches and advantages, on trajectories made here.


def trajectory(
    letters: str, reward: float | None, index: int, *, task: str = "t", first: int = 2, **kwargs: Any
) -> Trajectory:
    """A rollout by the letters of its tokens' roles, "|" before a further branch; token ids count up."""
    segments, token, turn = [], first, None
    for number, branch in enumerate(letters.split("|")):
        for a, b in pairwise(
            [i for i in range(len(branch) + 1) if i in (0, len(branch)) or branch[i] != branch[i - 1]]
        ):
            role = {"c": C, "t": T, "a": A, "e": E, "w": W}[branch[a]]
            ids = tuple(range(token, token + b - a))
            token += b - a
            if role is A:
                turn = 0 if turn is None else turn + 1
            own = turn if any(s.role is A and s.branch == number for s in segments) or role is A else None
            segments.append(Segment(role, ids, (-1.0,) * len(ids) if role is A else None, own, branch=number))
    failure = Failure("step", "SandboxError", "it broke") if reward is None else None
    stop = StopReason.SUBMITTED if failure is None else StopReason.FAILED
    return Trajectory(
        task_id=task,
        sample_index=index,
        segments=tuple(segments),
        reward=reward,
        failure=failure,
        stop_reason=stop,
        **kwargs,
    )


GROUPS = (
    (("ccaate", 1.0), ("caaateeae", 0.0), ("ccatww", None), ("caaeatw", 0.25)),
    (("caateee", 1.0), ("caaa", 1.0), ("caate", 1.0), ("cae", 1.0)),
)
SPLIT = (("caaee|ccaate", 1.0), ("caaaee", 0.0), ("cae|caatw|cae", None), ("caate", 0.5))


def groups(rows: Any = GROUPS) -> list[TrajectoryGroup]:
    return [
        TrajectoryGroup(f"t{g}", tuple(trajectory(x, r, i, task=f"t{g}") for i, (x, r) in enumerate(group)))
        for g, group in enumerate(rows)
    ]


def output_of(all_groups: list[TrajectoryGroup], config: ObjectiveConfig, *, step_wise: bool = False) -> dict[str, Any]:
    """What the generator makes of trajectories, without running them."""
    ids = [TrajectoryID(group.task_id, i) for group in all_groups for i in range(len(group))]
    generator = RolloutGenerator.__new__(RolloutGenerator)
    generator.objective, generator._step_wise = config, step_wise
    generator._renderer = type("Pad", (), {"pad_token_id": 0})()
    return generator._output(all_groups, ids, 1.0, training=True)


class NoWorkers:
    """Where a trainer sends batches; here only the number of processes is asked for."""

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def get_lcm_dp_size(self) -> int:
        return self.size


def trainer_of(config: ObjectiveConfig, *, prompts: int = 2, size: int = 4, processes: int = 1, **settings: Any) -> Any:
    settings = {
        "trainer.train_batch_size": prompts,
        "trainer.policy_mini_batch_size": prompts,
        "trainer.policy.model.path": BASE,
        "trainer.placement.colocate_all": False,
        "trainer.enable_ray_gpu_monitor": False,
        "generator.inference_engine.enable_ray_prometheus_stats": False,
        "trainer.algorithm.use_kl_loss": False,
        "trainer.algorithm.policy_loss_type": "backtalk_regular",
        "trainer.algorithm.loss_reduction": "sequence_mean",
        "generator.n_samples_per_prompt": size,
        **settings,
    }
    cfg = SkyRLTrainConfig.from_cli_overrides(settings)
    tokenizer = type("Pad", (), {"pad_token_id": 0})()
    trainer = EchoTrainer(
        cfg,
        None,
        tokenizer,
        None,
        None,
        None,
        world_model_coeff=config.world_model_coeff,
        world_normalizer=config.world_normalizer,
        world_loss_target=config.world_loss_target,
        max_seq_len=config.max_seq_len,
        world=config.world,
        policy_coeff=config.policy_coeff,
    )
    trainer.dispatch, trainer.global_step = NoWorkers(processes), 1
    return trainer


def to_batch(trainer: Any, output: dict[str, Any]) -> Any:
    """SkyRL's batch of a generator's output, with its advantages, as its loop makes it."""
    uids = [i.instance_id for i in output["trajectory_ids"]]
    output, uids = trainer.postprocess_generator_output(output, uids)
    batch = trainer.convert_to_training_input(output, uids)
    batch["action_log_probs"] = torch.full(batch["loss_mask"].shape, -2.0)
    batch["values"] = None
    return trainer.compute_advantages_and_returns(batch)


def normalized(trainer: Any, batch: Any) -> torch.Tensor:
    meta = batch.metadata
    return trainer._normalize_advantages(batch, meta["policy_mini_batch_boundaries"], meta["policy_prompt_boundaries"])[
        "advantages"
    ]


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("grpo", {}),
        ("dr_grpo", {"trainer.algorithm.grpo_norm_by_std": False}),
        ("rloo", {"trainer.algorithm.advantage_estimator": "rloo"}),
    ],
)
def test_skyrls_advantages_are_ours_and_a_rollout_that_broke_is_in_no_baseline(
    estimator: Any, settings: dict[str, Any]
) -> None:
    trainer = trainer_of(ObjectiveConfig(), **settings)
    batch = to_batch(trainer, output_of(groups(), ObjectiveConfig()))
    for g, group in enumerate(groups()):
        wanted = group_advantages(group.rewards, estimator=estimator)
        for i, advantage in enumerate(wanted):
            row, mask = batch["advantages"][4 * g + i], batch["response_mask"][4 * g + i].bool()
            assert row[mask].tolist() == pytest.approx([advantage] * int(mask.sum()), rel=1e-5, abs=1e-7)
    # (1 + 0 + .25 + 4) / 7 known rewards; SkyRL alone would say / 8.
    assert trainer.all_metrics["reward/avg_raw_reward"] == pytest.approx(5.25 / 7)


def slopes(samples: list[Sample], config: ObjectiveConfig) -> list[list[float]]:
    """d(loss)/d(logprob) of each token by Backtalk's own objective, at ratio 1."""
    counts, found = TokenCounts.of(samples, config.world_loss_target), []
    for sample in samples:
        batch = collate([sample], 0)
        logprobs = batch.sampling_logprobs_BT.clone().requires_grad_()
        objective_loss(logprobs, batch, counts, config)[0].backward()
        found.append(logprobs.grad[0].tolist())
    return found


@pytest.mark.parametrize("normalizer", ["sequence_mean", "sequence_mean_selected", "token_mean", "fixed_length"])
@pytest.mark.parametrize(("rows", "step_wise"), [(GROUPS, False), ((SPLIT, GROUPS[1]), True)])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "fixed_length"])
def test_both_terms_are_the_objectives_token_by_token(
    normalizer: Any, rows: Any, step_wise: bool, reduction: Any
) -> None:
    """Rollouts of several rows included: they weigh as one, in SkyRL's denominators too."""
    config = ObjectiveConfig(
        world_normalizer=normalizer,
        policy_normalizer=reduction,
        max_seq_len=50,
        world_model_coeff=0.3,
        world=WorldOptions(weights={"env_output": 0.5}),
    )
    names = {"fixed_length": "seq_mean_token_sum_norm"}
    trainer = trainer_of(
        config,
        processes=2 if step_wise else 1,
        **{
            "trainer.algorithm.loss_reduction": names.get(reduction, reduction),
            "trainer.algorithm.max_seq_len": 50,
            "generator.step_wise_trajectories": step_wise,
        },
    )
    batch = to_batch(trainer, output_of(groups(rows), config, step_wise=step_wise))
    channel = normalized(trainer, batch)
    samples = [s for group in groups(rows) for s in build_samples(group, config)]
    kept = [b for b in range(len(channel)) if not (batch["response_mask"][b].sum() == 1 and not channel[b].any())]
    assert len(kept) == len(samples)
    for b, sample, wanted in zip(kept, samples, slopes(samples, config), strict=True):
        length = int(batch["response_mask"][b].sum())
        # SkyRL's slope at ratio 1 is minus the advantage on actions; outside the mask the channel is the slope.
        mask = batch["loss_mask"][b]
        found = torch.where(mask > 0, -channel[b], channel[b])[len(mask) - length :].tolist()
        assert found == pytest.approx(wanted[len(sample) - length :], rel=2e-5, abs=1e-8)
        assert not any(wanted[: len(sample) - length])


def test_metrics_of_the_world_model_term() -> None:
    """Targets are the e of GROUPS: 1 + 3 + 0 + 1, 3 + 0 + 1 + 1; every log-probability is -2."""
    config = ObjectiveConfig(world_model_coeff=0.5, world_normalizer="token_mean")
    trainer = trainer_of(config, **{"trainer.algorithm.loss_reduction": "token_mean"})
    normalized(trainer, to_batch(trainer, output_of(groups(), config)))
    metrics = trainer.all_metrics
    assert (metrics["world/target_tokens"], metrics["world/target_ce"], metrics["world/coeff"]) == (10, 2.0, 0.5)
    assert metrics["world/loss"] == pytest.approx(2.0)
    # 1 / 10 for a target and 1 / 18 for an action: 2 + 4 + 1 + 3, 2 + 3 + 2 + 1.
    assert metrics["world/effective_obs_weight"] == pytest.approx(0.5 * 18 / 10)


def test_coefficient_zero_leaves_skyrls_advantages_and_measures() -> None:
    config = ObjectiveConfig(world_model_coeff=0.0)
    rows = ((("ccaate", 1.0), ("caaateeae", 0.0)), (("caateee", 1.0), ("caaa", 0.5)))
    ours = trainer_of(config, size=2)
    batch = to_batch(ours, output_of(groups(rows), config))
    plain = RayPPOTrainer(ours.cfg, None, ours.tokenizer, None, None, None)
    plain.dispatch = NoWorkers()
    own = to_batch(plain, output_of(groups(rows), config))
    mask = batch["loss_mask"] > 0
    mine, theirs = normalized(ours, batch), normalized(plain, own)
    assert torch.equal(mine[mask], theirs[mask]) and not bool(mine[~mask].any())
    assert ours.all_metrics["world/target_ce"] == 2.0 and ours.all_metrics["world/coeff"] == 0


def test_mini_batches_have_counts_of_their_own() -> None:
    """One prompt each: 5 targets in the first, 5 in the second, so 1/5 and not 1/10."""
    config = ObjectiveConfig(world_model_coeff=1.0, world_normalizer="token_mean")
    trainer = trainer_of(config, **{"trainer.policy_mini_batch_size": 1})
    channel = normalized(trainer, to_batch(trainer, output_of(groups(), config)))
    assert sorted(set(channel[channel < -0.19].tolist())) == pytest.approx([-0.2])


def test_a_schedule_follows_skyrls_steps() -> None:
    from backtalk.objective.coefficient import Schedule

    config = ObjectiveConfig(world_model_coeff=Schedule({0: 0.5, 1: 0.25}, "steps"))
    trainer = trainer_of(config)
    seen = []
    for step in (1, 2):
        trainer.global_step = step
        normalized(trainer, to_batch(trainer, output_of(groups(), config)))
        seen.append(trainer.all_metrics["world/coeff"])
    assert seen == [0.5, 0.25]


def test_equal_rewards_masked_by_skyrl_still_teach() -> None:
    """zero_variance_filter empties the loss mask of the second group; its observations stay."""
    config = ObjectiveConfig(world_model_coeff=1.0, world_normalizer="token_mean")
    trainer = trainer_of(config, **{"trainer.algorithm.zero_variance_filter": True})
    batch = to_batch(trainer, output_of(groups(), config))
    assert float(batch["loss_mask"][4:].sum()) == 0
    channel = normalized(trainer, batch)
    assert int((channel[4:] < 0).sum()) == 5


def test_another_generator_gives_roles() -> None:
    config = ObjectiveConfig(world_model_coeff=1.0, world_normalizer="token_mean")
    output = {
        "prompt_token_ids": [[5, 6], [5, 6]],
        "response_ids": [[7, 8, 9, 10, 11], [7, 8, 9]],
        "rewards": [1.0, 0.0],
        "loss_masks": [[1, 1, 0, 0, 1], [1, 0, 0]],
        "rollout_logprobs": [[-1.0, -1.0, 0.0, 0.0, -1.0], [-1.0, 0.0, 0.0]],
        "trajectory_ids": [TrajectoryID("p", 0), TrajectoryID("p", 1)],
        "token_roles": [[A, A, T, E, A], [A, E, W]],
    }
    trainer = trainer_of(config, prompts=1, size=2)
    channel = normalized(trainer, to_batch(trainer, dict(output)))
    assert channel.tolist()[0][2:4] == pytest.approx([0.0, -0.5])
    assert channel.tolist()[1][3:] == pytest.approx([-0.5, 0.0])
    with pytest.raises(ConfigError, match="no 'token_roles'"):
        to_batch(trainer, {k: v for k, v in output.items() if k != "token_roles"})
    with pytest.raises(ConfigError, match="what a policy sampled is ACTION"):
        to_batch(trainer, output | {"token_roles": [[A, A, T, E, E], [A, E, W]]})
    gated = trainer_of(replace(config, world=WorldOptions(return_adaptive=True)), prompts=1, size=2)
    with pytest.raises(ConfigError, match="return_adaptive need the turns and rewards"):
        to_batch(gated, dict(output))


# What is refused.


def test_a_method_that_was_renamed_is_named() -> None:
    class Moved:
        postprocess_generator_output = convert_to_training_input = print

    with pytest.raises(ConfigError, match=r"SkyRL 0\.4\.0 is not as .* has no _normalize_adv.*skyrl==0\.4\.0"):
        check_trainer(Moved)


def test_a_function_that_was_renamed_is_named() -> None:
    program = "from skyrl.backends.skyrl_train.utils import ppo_utils; del ppo_utils.sapo_policy_loss"
    command = [sys.executable, "-c", f"{program}; import backtalk.hosts.skyrl"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert re.search(r"ConfigError: SkyRL 0\.4\.0 is not as .*'sapo_policy_loss'.*skyrl==0\.4\.0", said), said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer.algorithm.policy_loss_type": "regular"}, "has no world-model term"),
        ({"trainer.algorithm.advantage_estimator": "reinforce++"}, "as one of reward 0"),
        ({"trainer.algorithm.dynamic_sampling.type": "filter"}, "throws away groups of equal rewards"),
        ({"generator.zero_reward_on_non_stop": True}, "only SkyRL's own generator reads"),
        ({"generator.sampling_params.temperature": 0.8}, "scores every token at temperature=0.8"),
        (
            {"trainer.algorithm.advantage_batch_normalize": True, "generator.step_wise_trajectories": True},
            "takes its mean over rows",
        ),
    ],
)
def test_settings_that_would_not_be_exact_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(ObjectiveConfig(), **settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectiveConfig(world_model_coeff=Share(0.2)), "share of the gradient"),
        (ObjectiveConfig(world=WorldOptions(loss="clipped_mae")), "world options loss cannot be kept"),
        (ObjectiveConfig(world=WorldOptions(observations="shuffled")), "world options observations cannot be kept"),
        (ObjectiveConfig(world=WorldOptions(drop_surprising=0.1, head="keep")), "head, drop_surprising cannot be kept"),
    ],
)
def test_options_that_skyrl_cannot_keep_are_refused(config: ObjectiveConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(config)


def test_the_objective_gives_skyrls_settings_and_contradictions_are_refused() -> None:
    settings = {"trainer.policy.model.path": BASE, "trainer.logger": "console"}
    config = ObjectiveConfig(clip=(0.2, 0.28), policy_normalizer="token_mean")
    algorithm = echo_config(config, settings).trainer.algorithm
    assert (algorithm.eps_clip_low, algorithm.eps_clip_high, algorithm.loss_reduction) == (0.2, 0.28, "token_mean")
    assert algorithm.policy_loss_type == "backtalk_regular" and not algorithm.use_kl_loss
    with pytest.raises(ConfigError, match=r"eps_clip_high=0\.2, not 0\.28"):
        echo_config(config, settings, ["trainer.algorithm.eps_clip_high=0.2"])
    with pytest.raises(ConfigError, match="kl_coeff"):
        echo_config(ObjectiveConfig(policy=PolicyOptions(kl_coeff=0.1)), settings)


# Real rollouts, over HTTP by SkyRL's client, and SkyRL's loop on them.


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[Loopback, Any]]:
    with serve(BASE) as both:
        yield both


@pytest.fixture
def fresh(engine: tuple[Loopback, Any]) -> tuple[Loopback, Any]:
    loopback = engine[0]
    loopback.requests.clear()
    loopback.finished.clear()
    loopback.spoil, loopback.status = (lambda choice: choice), 200
    return engine


LIMITS = RolloutLimits(max_turns=3, max_tokens=900, max_tokens_per_turn=48, concurrency=4)


def triage(count: int) -> tuple[TerminalWorld, list[Task]]:
    world = TerminalWorld(PooledBackend(local_sandbox()), TerminalConfig(max_output_chars=500))
    return world, load_tasks("triage", split=Split.TRAIN, count=count, levels=(1,))


def request_of(tasks: list[Task], count: int, temperature: float = 1.0) -> dict[str, Any]:
    """What SkyRL's loop passes to a generator, by its own functions."""
    rows = TaskPrompts(tasks)
    params = get_sampling_params_for_backend("vllm", SamplingParams(temperature=temperature, max_generate_length=48))
    prompts = rows.collate_fn([rows[i] for i in range(len(rows))])
    return prepare_generator_input(prompts, count, params, "backtalk", "train", 1)[0]


def test_rollouts_keep_the_engines_tokens_and_log_probabilities(fresh: tuple[Loopback, Any]) -> None:
    loopback, client = fresh
    world, tasks = triage(2)
    generator = RolloutGenerator(world, tasks, client, loopback.tokenizer, objective=ObjectiveConfig(), limits=LIMITS)

    async def run() -> dict[str, Any]:
        try:
            return await generator.generate(request_of(tasks, 2))
        finally:
            await generator.close()

    output = asyncio.run(run())
    validate_generator_output(4, output)
    assert [i.to_string() for i in output["trajectory_ids"]] == ["0_0", "0_1", "1_0", "1_1"]
    rows = [p + r for p, r in zip(output["prompt_token_ids"], output["response_ids"], strict=True)]
    by_session: dict[str, list[list[int]]] = {}
    for asked in loopback.requests:
        by_session.setdefault(asked["session"], []).append(asked["token_ids"])
    assert len(by_session) == 4 and sorted(loopback.finished) == sorted(by_session)
    for histories in by_session.values():  # each turn's history is a prefix of one row, to the token
        assert any(all(row[: len(history)] == history for history in histories) for row in rows)
    assert {asked["sampling_params"]["max_tokens"] for asked in loopback.requests} == {48}
    sampled = 0
    for row, mask, logprobs in zip(rows, output["loss_masks"], output["rollout_logprobs"], strict=True):
        with torch.no_grad():
            scores = loopback.model(torch.tensor([row])).logits[0].log_softmax(-1)
        start = len(row) - len(mask)
        for k, (is_sampled, logprob) in enumerate(zip(mask, logprobs, strict=True)):
            if is_sampled:
                sampled += 1
                assert logprob == pytest.approx(float(scores[start + k - 1, row[start + k]]), abs=2e-4)
    assert sampled == output["rollout_metrics"]["generate/avg_assistant_tokens"] * 4 > 20
    observed = sum(int((sample.roles == E).sum()) for sample in output[SAMPLES])
    assert observed > 0 and output["rollout_metrics"]["generate/rollouts"] == 4


@pytest.mark.parametrize(
    ("spoil", "status", "message"),
    [
        (lambda choice: choice | {"logprobs": {"content": choice["logprobs"]["content"][:-1]}}, 200, "one a token"),
        (lambda choice: choice | {"finish_reason": "abort"}, 200, "ended by 'abort'"),
        (lambda choice: choice, 400, "did not answer"),
    ],
)
def test_an_engine_that_breaks_ends_the_step_with_its_reason(
    spoil: Any, status: int, message: str, fresh: tuple[Loopback, Any]
) -> None:
    loopback, client = fresh
    loopback.spoil, loopback.status = spoil, status
    world, tasks = triage(1)
    limits = replace(LIMITS, max_retries=0)
    generator = RolloutGenerator(world, tasks, client, loopback.tokenizer, objective=ObjectiveConfig(), limits=limits)

    async def run() -> None:
        try:
            await generator.generate(request_of(tasks, 2))
        finally:
            await generator.close()

    with pytest.raises(InfrastructureError, match=rf"all 2 rollouts failed.*{message}"):
        asyncio.run(run())


class Dispatch(WorkerDispatch):
    """SkyRL's dispatch; the weights never move here, so the engine has them already."""

    def init_weight_sync_state(self, client: Any) -> None: ...

    async def save_weights_for_sampler(self, *args: Any, **kwargs: Any) -> None: ...


class Tracker:
    """Keeps what SkyRL logs."""

    def __init__(self) -> None:
        self.logs: dict[int, dict[str, float]] = {}

    def log(self, data: dict[str, float], step: int, commit: bool = False) -> None:
        self.logs.setdefault(step, {}).update(data)

    def finish(self) -> None: ...


def experiment(tmp_path: Path, client: Any, workers: Any, trainer_class: type, **settings: Any) -> tuple[Any, Tracker]:
    """SkyRL's experiment with its own loop, two workers on the CPU, and an engine on this machine."""
    objective = ObjectiveConfig(world_model_coeff=0.1)
    world, tasks = triage(6)
    cfg = echo_config(
        objective,
        {
            "trainer.policy.model.path": BASE,
            "trainer.policy.optimizer_config.lr": 0.0,
            "trainer.placement.colocate_all": False,
            "trainer.placement.policy_num_gpus_per_node": 2,
            "trainer.train_batch_size": 2,
            "trainer.policy_mini_batch_size": 2,
            "trainer.eval_interval": 2,
            "trainer.eval_before_train": False,
            "trainer.eval_batch_size": 2,
            "trainer.dump_eval_results": False,
            "trainer.max_training_steps": 2,
            "trainer.epochs": 2,
            "trainer.ckpt_interval": -1,
            "trainer.resume_mode": "none",
            "trainer.logger": "console",
            "trainer.print_example_interval": 0,
            "trainer.enable_ray_gpu_monitor": False,
            "trainer.max_prompt_length": 900,
            "trainer.export_path": str(tmp_path),
            "trainer.ckpt_path": str(tmp_path),
            "generator.inference_engine.enable_ray_prometheus_stats": False,
            "generator.n_samples_per_prompt": 2,
            "generator.max_turns": 3,
            "generator.max_input_length": 900,
            "generator.sampling_params.max_generate_length": 48,
            "generator.eval_sampling_params.temperature": 1.0,
            **settings,
        },
    )
    made = EchoExperiment(
        cfg, world, tasks[:4], eval_tasks=tasks[4:], objective=objective, limits=LIMITS, trainer_class=trainer_class
    )
    tracker = Tracker()
    trainer = made.get_trainer(
        cfg,
        tracker,
        made.tokenizer,
        made.train_dataset,
        eval_dataset=made.eval_dataset,
        inference_engine_client=client,
        generator=made.get_generator(cfg, made.tokenizer, client),
        colocate_pg=None,
    )
    ray.get(workers.async_run_ray_method("pass_through", "begin", cfg.trainer))
    ray.get(workers.async_init_model(BASE))
    trainer.dispatch = Dispatch(cfg, policy_actor_group=workers, inference_engine_client=client)
    return trainer, tracker


def test_two_steps_of_skyrls_loop_on_two_workers(
    tmp_path: Path, fresh: tuple[Loopback, Any], suite_trainer: SkyRLUnderTest
) -> None:
    """Its own train(): rollouts, batch, forward, advantages, update, evaluation; the last gradient is ours."""
    kept: list[list[Sample]] = []

    class Keeping(EchoTrainer):
        def convert_to_training_input(self, generator_output: dict[str, Any], uids: list[str]) -> Any:
            kept.append(list(generator_output[SAMPLES]))
            return super().convert_to_training_input(generator_output, uids)

    workers = suite_trainer.actors(2)
    trainer, tracker = experiment(tmp_path, fresh[1], workers, Keeping)
    asyncio.run(trainer.train())
    assert sorted(step for step, log in tracker.logs.items() if "world/loss" in log) == [1, 2]
    log = tracker.logs[2]
    samples = kept[-1]
    targets = sum(sample.counts("env_only").targets for sample in samples)
    assert log["world/target_tokens"] == targets and log["generate/rollouts"] == 4
    assert "eval/all/avg_score" in log and log["eval/all/generate/rollouts"] == 2
    assert log["policy/rollout_train_logprobs_abs_diff_max"] < 2e-4  # the engine and the workers agree
    # SkyRL's own count of the term, summed over workers and micro-batches: lambda times the loss of the step.
    assert log["policy/loss_metrics/world_loss"] == pytest.approx(0.1 * log["world/loss"], rel=1e-4)
    seen = ray.get(workers.async_run_ray_method("pass_through", "seen"))
    assert torch.equal(seen[0][0], seen[1][0])
    wanted = head_gradient(samples, ObjectiveConfig(world_model_coeff=0.1))
    assert float((seen[0][0] - wanted).norm() / wanted.norm()) < 1e-3


def head_gradient(samples: list[Sample], config: ObjectiveConfig) -> torch.Tensor:
    """The gradient of the head by Backtalk's own objective, row by row."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    counts = TokenCounts.of(samples)
    for sample in samples:
        logits = model(sample.token_ids[None]).logits[0, :-1].log_softmax(-1)
        logprobs = torch.cat([torch.zeros(1), logits.gather(-1, sample.token_ids[1:, None])[:, 0]])[None]
        objective_loss(logprobs, collate([sample], 0), counts, config)[0].backward()
    return model.lm_head.weight.grad


def test_the_smoke_trainer_measures_its_first_step(
    tmp_path: Path, fresh: tuple[Loopback, Any], suite_trainer: SkyRLUnderTest, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, tracker = experiment(
        tmp_path, fresh[1], suite_trainer.actors(2), SmokeTrainer, **{"trainer.eval_interval": -1}
    )
    asyncio.run(trainer.train())
    assert len(trainer.claims) >= 2 and all(claim.error < 1e-5 for claim in trainer.claims[-2:-1])
    assert all(claim.holds for claim in trainer.claims)
    assert "twice the coefficient is twice the world-model gradient" in capsys.readouterr().out
    assert trainer.objective.world_model_coeff == 0.1 and sorted(tracker.logs) == [1, 2]


def test_the_recipe_of_the_published_setting_is_one_that_skyrl_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "recipes/terminal_8b"
    monkeypatch.syspath_prepend(str(folder))
    import train as recipe

    config = load_config(folder / "terminal_8b.yaml", ["engine.model=base"])
    own = recipe.flat(yaml.safe_load((folder / "skyrl.yaml").read_text()))
    cfg = echo_config(config.objective, {**recipe.skyrl_settings(config), **own})
    algorithm, optimizer = cfg.trainer.algorithm, cfg.trainer.policy.optimizer_config
    assert (cfg.trainer.train_batch_size, cfg.generator.n_samples_per_prompt) == (16, 16)
    assert (algorithm.eps_clip_low, algorithm.eps_clip_high, algorithm.temperature) == (0.2, 0.28, 0.8)
    assert (algorithm.loss_reduction, algorithm.use_kl_loss) == ("sequence_mean", False)
    assert (optimizer.lr, optimizer.adam_betas, optimizer.max_grad_norm) == (1e-6, [0.9, 0.95], 0.2)
    assert cfg.generator.inference_engine.engine_init_kwargs == {"max_model_len": 16384}

    world = recipe.RunWorld(load_config(folder / "terminal_8b.yaml", ["engine.model=base", "tasks.source=triage"]))
    task = world.tasks(Split.TRAIN, 2, 0)[0]

    async def open_one() -> str:
        async with world.open(task) as env:
            first = await env.reset()
        await world.close()
        return first[-1].text

    assert task.instruction in asyncio.run(open_one())
