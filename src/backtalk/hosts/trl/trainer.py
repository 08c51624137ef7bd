"""``EchoGRPOTrainer``: TRL's ``GRPOTrainer`` with the world-model term added to its loss.

Three methods that have kept their arguments from TRL 1.0 to 1.16 are wrapped: ``_prepare_inputs``,
``_generate_and_score_completions`` and ``_compute_loss``. Two more are listened to: ``_calculate_rewards`` has the
messages of TRL's tool loop, and ``_get_per_token_logps_and_entropies`` the log-probabilities of the loss. All pass
their arguments and results on unchanged, so a coefficient of 0 is TRL's own GRPO to the bit.

B rows, C tokens of the longest completion. *_BC is [B, C].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from backtalk.errors import ConfigError
from backtalk.hosts.trl.roles import ToolRoles, rollout_trajectory
from backtalk.hosts.trl.rows import (
    COUNTS,
    ROLLOUTS,
    SCALES,
    WEIGHTS,
    policy_weight,
    rollout_inputs,
    row_scales,
    world_inputs,
)
from backtalk.hosts.trl.support import check_objective, check_trainer, refuse_compiled
from backtalk.objective.coefficient import Schedule
from backtalk.objective.config import ObjectiveConfig, WorldNormalizer, WorldOptions
from backtalk.objective.forms import world_token_loss
from backtalk.objective.roles import WorldLossTarget
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup

# Its attributes are those of whichever release is installed; ``check_trainer`` looks for the ones that are used.
_Trainer: Any = GRPOTrainer
ACTION = int(TokenRole.ACTION)

log = logging.getLogger(__name__)

ROLES_KEY = "token_roles"  # of what a rollout function returns


class Rollouts(Protocol):
    """Rollouts of Backtalk's own: a function from rows of the dataset to samples."""

    def __call__(self, inputs: Sequence[Mapping[str, Any]], trainer: EchoGRPOTrainer) -> Sequence[Sample]:
        """Return the samples of this process's rows, with the advantages of their groups."""
        ...


class EchoGRPOTrainer(_Trainer):
    """A ``GRPOTrainer`` that also learns what its environment answers; it takes all of TRL's own arguments.

    Args:
        world_model_coeff: lambda, a number or a schedule over optimizer steps.
        world_normalizer, world_loss_target, max_seq_len, world: of the objective (docs/objective.md). The policy term,
            its clipping, its denominator and its KL are TRL's (``loss_type``, ``epsilon``, ``beta``).
        rollouts: Backtalk's own rollouts in place of TRL's generation, for example ``WorldRollouts``.

    Raises:
        ConfigError: a setting that cannot be kept exactly, a class that Unsloth compiled, a TRL that has moved on.
    """

    def __init__(
        self,
        *args: Any,
        world_model_coeff: float | Schedule = 0.05,
        world_normalizer: WorldNormalizer = "sequence_mean",
        world_loss_target: WorldLossTarget = "env_only",
        max_seq_len: int | None = None,
        world: WorldOptions | None = None,
        rollouts: Rollouts | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_compiled(GRPOTrainer)
        self.objective = ObjectiveConfig(
            world_model_coeff=world_model_coeff,
            world_normalizer=world_normalizer,
            world_loss_target=world_loss_target,
            max_seq_len=max_seq_len,
            world=world or WorldOptions(),
        )
        self.rollouts = rollouts
        if rollouts is not None and len(args) < 2:
            kwargs.setdefault("reward_funcs", _no_reward)
        super().__init__(*args, **kwargs)
        check_trainer(self)
        check_objective(self)
        self._tool_roles: ToolRoles | None = None
        self._messages: list[Any] = []
        self._completion_ids: list[list[int]] = []
        self._given_roles: list[list[int]] | None = None
        if self.rollout_func is not None:
            self.rollout_func = self._keeping_roles(self.rollout_func)
        self._window: dict[str, Any] = {"left": 0, "size": 1, "counts": None, "sums": None}
        self._logprobs_BC: Tensor | None = None

    # What TRL calls, in the order of a step.

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Add the counts of the optimizer step to the micro-batch that TRL returns."""
        inputs = super()._prepare_inputs(*args, **kwargs)
        if not self.model.training:
            self._begin_window([inputs], size=1)
        elif self._window["left"] == 0:
            first, size = self._step % self.args.steps_per_generation, self.current_gradient_accumulation_steps
            self._begin_window(self._buffered_inputs[first : first + size], size=size)
        return {**inputs, COUNTS: self._window["counts"]}

    def _begin_window(self, micro_batches: Sequence[Mapping[str, Any]], *, size: int) -> None:
        """Count rollouts and target tokens of an optimizer step over all processes."""
        local = torch.stack(
            [
                torch.stack([part[ROLLOUTS].sum() for part in micro_batches]).sum(),
                torch.stack([(part[WEIGHTS] > 0).sum() for part in micro_batches]).sum().float(),
            ]
        )
        counts = self.accelerator.reduce(local, reduction="sum") * (size / len(micro_batches))
        self._window = {"left": size, "size": size, "counts": counts, "sums": torch.zeros(5, device=local.device)}

    def _generate_and_score_completions(self, inputs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Add the weights of the world-model term to a batch of completions."""
        if self.rollouts is not None:
            return self._own_rollouts(inputs)
        self._messages, self._completion_ids, self._given_roles = [], [], None
        output = super()._generate_and_score_completions(inputs, *args, **kwargs)
        samples = [
            sample
            for row in self._trajectories(output)
            for sample in build_samples(TrajectoryGroup(row.task_id, (row,)), self.objective)
        ]
        starts = [int(mask.sum()) for mask in output["prompt_mask"]]
        return output | world_inputs(samples, starts, output["completion_mask"], self.objective)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any, *args: Any) -> Any:
        """Remember the messages and tokens of the completions."""
        self._messages, self._completion_ids = list(completions), [list(ids) for ids in completion_ids]
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids, *args)

    def _compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return TRL's loss plus the world-model term; TRL's own object where the coefficient is 0."""
        self._logprobs_BC = None
        loss = super()._compute_loss(model, inputs, *args, **kwargs)
        if self._logprobs_BC is None:
            raise ConfigError(
                "TRL's _compute_loss no longer takes its log-probabilities from _get_per_token_logps_and_entropies; "
                "install a version that docs/trl.md names"
            )
        logprobs_BC, self._logprobs_BC = self._logprobs_BC, None
        config = self.objective.at(self.state.global_step)
        by_tokens = config.world_normalizer == "token_mean"
        weights_BC = inputs[WEIGHTS] / inputs[COUNTS][1 if by_tokens else 0].clamp(min=1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.world_coeff > 0):
            token_loss_BC = world_token_loss(logprobs_BC, weights_BC > 0, config.world.loss)
            world = (token_loss_BC * weights_BC).sum()
        self._log_world(world.detach(), logprobs_BC.detach(), weights_BC, inputs, config)
        if config.world_coeff == 0:
            return loss
        # Data-parallel gradients are averaged, and this is a share of a sum over all processes.
        return loss + config.world_coeff * self.accelerator.num_processes * world

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Remember the log-probabilities, which come first in every version."""
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logprobs_BC = result[0]
        return result

    # Who wrote which token.

    def _trajectories(self, output: Mapping[str, Tensor]) -> list[Trajectory]:
        """Return the rows of a batch with the role of each token."""
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        completions = self._completion_ids
        if self._given_roles is not None:
            rows = zip(prompts, completions, self._given_roles, strict=True)
            return [rollout_trajectory(prompt, ids, roles) for prompt, ids, roles in rows]
        if "tool_mask" not in output:
            return [
                rollout_trajectory(p, ids, [ACTION] * len(ids)) for p, ids in zip(prompts, completions, strict=True)
            ]
        if self._tool_roles is None:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            self._tool_roles = ToolRoles(tokenizer, self.chat_template, self.chat_template_kwargs)
        masks = [mask[: len(ids)].tolist() for mask, ids in zip(output["tool_mask"], completions, strict=True)]
        rows = zip(prompts, completions, masks, self._messages, strict=True)
        return [self._tool_roles.trajectory(*row) for row in rows]

    def _keeping_roles(self, rollout_func: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Wrap a rollout function: take ``token_roles`` out of what it returns, and make TRL's mask of them."""

        def keep(*args: Any, **kwargs: Any) -> dict[str, Any]:
            output = dict(rollout_func(*args, **kwargs))
            roles = output.pop(ROLES_KEY, None)
            if roles is None:
                if self.objective.at(0).world_coeff > 0 or isinstance(self.objective.world_model_coeff, Schedule):
                    raise ConfigError(
                        f"rollout_func returned no {ROLES_KEY!r}, so nobody knows which tokens are observations; add a "
                        "list for each completion with one backtalk.trajectory.TokenRole a token"
                    )
                roles = [[ACTION] * len(ids) for ids in output["completion_ids"]]
            else:
                mask = [[int(role == ACTION) for role in row] for row in roles]
                if output.setdefault("env_mask", mask) != mask:
                    raise ConfigError(
                        f"rollout_func returned an env_mask that is not 1 exactly where {ROLES_KEY} is ACTION; leave "
                        "env_mask out"
                    )
            self._given_roles = roles
            return output

        return keep

    # Backtalk's own rollouts.

    def _own_rollouts(self, inputs: Any) -> dict[str, Tensor]:
        """Return Backtalk's own rollouts as TRL's generation returns its own."""
        assert self.rollouts is not None
        samples = list(self.rollouts(inputs, self))
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        device = self.accelerator.device
        # TRL drops what does not divide, and gathers rows from all processes, which must have as many of them.
        multiple = self.args.steps_per_generation if self.model.training else 1
        most = int(self.accelerator.gather(torch.tensor([len(samples)], device=device)).max())
        output, rows = rollout_inputs(
            samples,
            self.objective,
            count=math.ceil(most / multiple) * multiple,
            pad_token_id=tokenizer.pad_token_id,
            device=device,
        )
        actions = sum(int(sample.sampled.sum()) for sample in samples)  # of failed rows too, which stay in the mean
        local = torch.tensor(
            [actions, sum(sample.branch == 0 for sample in samples)], device=device, dtype=torch.float32
        )
        total, rollouts = self.accelerator.reduce(local, reduction="sum")
        scales = row_scales(
            rows, self.loss_type, per_rollout=len(rows) * self.accelerator.num_processes / max(float(rollouts), 1.0)
        ).to(device)
        output[SCALES], output["advantages"] = scales, output["advantages"] * scales
        return output | {"num_items_in_batch": total}

    # Metrics, in TRL's own log.

    def _log_world(
        self,
        world: Tensor,
        logprobs_BC: Tensor,
        weights_BC: Tensor,
        inputs: Mapping[str, Tensor],
        config: ObjectiveConfig,
    ) -> None:
        """Add a micro-batch to the metrics of its step, and log them at its end; the same names on every process."""
        window, target_BC = self._window, weights_BC > 0
        policy = policy_weight(
            inputs,
            self.loss_type,
            max_completion_length=self.max_completion_length,
            microbatches=window["size"] * self.accelerator.num_processes,
            token_share=self.args.steps_per_generation / window["size"] if self.model.training else 1.0,
        )
        actions = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).sum()
        ce = -logprobs_BC.masked_fill(~target_BC, 0.0).sum()
        window["sums"] += torch.stack([world, ce, weights_BC.sum(), policy, actions]).float()
        window["left"] -= 1
        if window["left"] > 0:
            return
        world_sum, ce_sum, weight, policy_sum, action_tokens = self.accelerator.reduce(window["sums"], "sum").tolist()
        targets = float(window["counts"][1])
        observation = weight / targets if targets else math.nan
        action = policy_sum / action_tokens if action_tokens else math.nan
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["world/loss"].append(world_sum)
        metrics["world/target_ce"].append(ce_sum / targets if targets else math.nan)
        metrics["world/target_tokens"].append(targets)
        metrics["world/coeff"].append(config.world_coeff)
        metrics["world/effective_obs_weight"].append(config.world_coeff * observation / action if action else math.nan)
        metrics["world/unplaced_tokens"].append(float(self._tool_roles.unplaced) if self._tool_roles else 0.0)


def _no_reward(completions: Sequence[Any], **kwargs: Any) -> list[None]:
    """Stand where TRL asks for a reward function, which Backtalk's own rollouts do not use."""
    return [None] * len(completions)
