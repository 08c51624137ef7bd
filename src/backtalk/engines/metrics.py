"""Token metrics of a train step: cross-entropies, ratios, and the balance of the two terms.

B samples, T tokens. *_BT is [B, T], *_B is [B].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from backtalk.objective.batch import Batch, TokenCounts, collate, policy_mask, target_mask
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.forms import kl_to_reference, sequence_ratio
from backtalk.objective.gradients import TermGradients
from backtalk.objective.loss import policy_weights, world_weights
from backtalk.objective.samples import Sample, to_samples
from backtalk.trajectory import TokenRole, Trajectory, copied_tokens


@dataclass(slots=True)
class StepRecord:
    """Results of a step's micro-batches by token, for the metrics; float64 on the CPU, one tensor a sample."""

    samples: list[Sample] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)  # nats
    gradients: list[Tensor] = field(default_factory=list)  # d(loss) / d(logprobs)
    reference: list[Tensor] = field(default_factory=list)  # nats; empty without a KL term
    # Squared norms of the gradient at the last hidden states, each of which predicts one token of one term.
    policy_square: float = 0.0
    world_square: float = 0.0

    def add(self, samples: Sequence[Sample], batch: Batch, logprobs_BT: Tensor) -> None:
        """Add a micro-batch after its backward pass, in which ``logprobs_BT`` retained its gradient."""
        gradient_BT = torch.zeros_like(logprobs_BT) if logprobs_BT.grad is None else logprobs_BT.grad
        self.samples += samples
        self.logprobs += _rows(logprobs_BT, samples)
        self.gradients += _rows(gradient_BT, samples)
        if batch.reference_logprobs_BT is not None:
            self.reference += _rows(batch.reference_logprobs_BT, samples)

    def add_states(self, gradient_ND: Tensor, is_action_N: Tensor) -> None:
        """Add the gradient at the hidden state before each trained token; ``is_action_N`` says which are actions."""
        wide = torch.float64 if gradient_ND.dtype == torch.float64 else torch.float32
        squares_N = torch.linalg.vector_norm(gradient_ND, dim=-1, dtype=wide).cpu().double().square()
        is_action_N = is_action_N.cpu()
        self.policy_square += float(squares_N[is_action_N].sum())
        self.world_square += float(squares_N[~is_action_N].sum())

    def scale_world(self, coeff: float) -> None:
        """Multiply the gradients of the world-model term, recorded at coefficient 1, by its coefficient."""
        self.world_square *= coeff**2
        for gradient, sample in zip(self.gradients, self.samples, strict=True):
            gradient[~sample.sampled] *= coeff


def _rows(values_BT: Tensor, samples: Sequence[Sample]) -> list[Tensor]:
    """Copy a batch's values to the CPU as float64, without padding."""
    rows = values_BT.detach().cpu().double()
    return [row[: len(sample)] for row, sample in zip(rows, samples, strict=True)]


def copied_mask(sample: Sample) -> Tensor:
    """Return the observation tokens in a run of at least 3 that is also in the same turn's action; bool [T].

    `cat notes.txt: No such file` repeats the command, and a model predicts the repeated part without knowing anything
    about the environment, so metrics report its cross-entropy apart.
    """
    spans = ((span.start, span.end, span.role, span.turn) for span in sample.spans)
    return torch.tensor(copied_tokens(sample.token_ids.tolist(), spans), dtype=torch.bool)


def token_metrics(
    record: StepRecord, counts: TokenCounts, config: ObjectiveConfig, tools: Iterable[str] = ()
) -> dict[str, float]:
    """Compute the token metrics of a step. A mean over no token is NaN.

    ``tools`` are those that get a cross-entropy of their own.
    """
    if not record.samples:
        empty = Trajectory(task_id="", sample_index=0, segments=())
        record = StepRecord(to_samples(empty), logprobs=[torch.zeros(0)], gradients=[torch.zeros(0)])
    batch, logprobs_BT = collate(record.samples, 0), _pad(record.logprobs)
    reference_BT = _pad(record.reference) if record.reference else None
    return (
        _cross_entropies(logprobs_BT, record.samples, batch, config, tools)
        | _policy(logprobs_BT, reference_BT, batch, config)
        | _balance(_pad(record.gradients), batch, counts, config)
        | _gradient_norms(record, batch, config)
        | {name: float(count) for name, count in asdict(counts).items()}
    )


def _cross_entropies(
    logprobs_BT: Tensor, samples: Sequence[Sample], batch: Batch, config: ObjectiveConfig, tools: Iterable[str]
) -> dict[str, float]:
    """Compute cross-entropies by role, by tool and by copied text, in nats a token, and shares of tokens by role."""
    own_B1 = torch.tensor([not sample.is_control for sample in samples])[:, None]
    real_BT = (torch.arange(batch.roles_BT.shape[1]) < batch.lengths_B[:, None]) & own_B1

    def ce(selected_BT: Tensor) -> float:
        return _mean(-logprobs_BT, selected_BT)

    def has_role(role: TokenRole) -> Tensor:
        return (batch.roles_BT == role) & real_BT

    output_BT, copied_BT = has_role(TokenRole.ENV_OUTPUT), _pad([copied_mask(sample) for sample in samples])
    target_BT = target_mask(batch, config)
    return (
        {
            "target_ce": ce(target_BT),
            "env_output_ce": ce(output_BT),
            "env_output_ce_copied": ce(output_BT & copied_BT),
            "env_output_ce_new": ce(output_BT & ~copied_BT),
            "warning_ce": ce(has_role(TokenRole.WARNING)),
            "template_ce": ce(target_BT & (batch.roles_BT == TokenRole.TEMPLATE)),
            "copied_share": _mean(copied_BT.double(), output_BT),
        }
        | {f"env_output_ce/{tool}": ce(output_BT & _of_tool(samples, tool)) for tool in tools}
        | {f"{role.name.lower()}_share": _mean(has_role(role).double(), real_BT) for role in TokenRole}
    )


def _of_tool(samples: Sequence[Sample], tool: str) -> Tensor:
    """Return the tokens of a tool's calls and observations; bool [B, T]."""
    rows = [torch.zeros(len(sample), dtype=torch.bool) for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        for span in sample.spans:
            row[span.start : span.end] = span.tool == tool
    return _pad(rows)


def _policy(
    logprobs_BT: Tensor, reference_BT: Tensor | None, batch: Batch, config: ObjectiveConfig
) -> dict[str, float]:
    """Compute the metrics of action tokens: entropy, ratios, clipping, KL, and the gap to the sampler."""
    trained_BT, action_BT = policy_mask(batch), batch.sampled_BT
    gap_BT = logprobs_BT - batch.sampling_logprobs_BT
    log_ratio_BT = gap_BT.masked_fill(~trained_BT, 0.0)
    if config.policy.loss == "gspo":
        log_ratio_BT = sequence_ratio(log_ratio_BT, trained_BT).log()
    ratio_BT, adv_B1 = log_ratio_BT.exp(), batch.advantages_B[:, None]
    low, high = 1 - config.clip[0], 1 + config.clip[1]
    clipped_BT = ((ratio_BT > high) & (adv_B1 > 0)) | ((ratio_BT < low) & (adv_B1 < 0))
    if config.policy.max_importance_ratio is not None:  # the clipped ratio is then the trainer's own, which is 1
        clipped_BT = torch.zeros_like(clipped_BT)
    kl_BT = None if reference_BT is None else kl_to_reference(logprobs_BT, reference_BT, trained_BT)
    return {
        "entropy": _mean(-logprobs_BT, action_BT),
        "ratio_mean": _mean(ratio_BT, trained_BT),
        "clip_fraction": _mean(clipped_BT.double(), trained_BT),
        "reference_kl": math.nan if kl_BT is None else _mean(kl_BT, trained_BT),
        "sampler_logprob_gap": float(gap_BT[action_BT].abs().amax()) if bool(action_BT.any()) else math.nan,
    }


def sampler_gap(record: StepRecord) -> float:
    """Return the mean |trainer - sampler| in nats over the actions of the version that is trained; NaN without any."""
    fresh = [
        (logprobs - sample.sampling_logprobs.double())[sample.sampled]
        for sample, logprobs in zip(record.samples, record.logprobs, strict=True)
        if sample.staleness == 0
    ]
    gaps = torch.cat([torch.zeros(0), *fresh])
    return float(gaps.abs().mean()) if len(gaps) else math.nan


def _balance(gradients_BT: Tensor, batch: Batch, counts: TokenCounts, config: ObjectiveConfig) -> dict[str, float]:
    """Compare the two terms by their weights and by the L1 norm of d(loss)/d(logprobs)."""
    p_BT = policy_weights(batch, counts, config, torch.float64)
    w_BT = world_weights(batch, counts, config, torch.float64)
    policy_weight = config.policy_coeff * _mean(p_BT, policy_mask(batch))
    world_weight = config.world_coeff * _mean(w_BT, target_mask(batch, config))
    pull_BT = gradients_BT.abs()
    policy_pull, pull = float(pull_BT[batch.sampled_BT].sum()), float(pull_BT.sum())
    return {
        "effective_obs_weight": world_weight / policy_weight if policy_weight else math.nan,
        "world_pull_share": 1 - policy_pull / pull if pull else math.nan,
    }


def _gradient_norms(record: StepRecord, batch: Batch, config: ObjectiveConfig) -> dict[str, float]:
    """Compute each term's gradient norm at the last hidden states.

    There the state before a token belongs to the term of that token alone, so the terms can be told apart at no cost.
    In the weights below they are sums over tokens, in which policy gradients of either sign cancel and those of a
    cross-entropy add up, so the ratio over the weights (``term_metrics``) is several times this one.
    """
    has_policy = config.policy_coeff > 0 and bool(policy_mask(batch).any())
    has_world = config.world_coeff > 0 and bool(target_mask(batch, config).any())
    policy = math.sqrt(record.policy_square) if has_policy else math.nan
    world = math.sqrt(record.world_square) if has_world else math.nan
    return {
        "policy_grad_norm": policy,
        "world_grad_norm": world,
        "grad_norm_ratio": world / policy if policy else math.nan,  # a policy gradient of 0 has nothing to compare
    }


def term_metrics(terms: TermGradients | None, coeff: float) -> dict[str, float]:
    """Return the metrics of both terms' gradients over the trained weights; NaN in a step that did not measure them."""
    return {
        "policy_grad_norm_weights": math.nan if terms is None else terms.policy_norm,
        "world_grad_norm_weights": math.nan if terms is None else terms.world_norm,
        "world_grad_share": math.nan if terms is None else terms.world_share(coeff),
        "grad_cosine": math.nan if terms is None else terms.cosine,
    }


def _mean(values_BT: Tensor, selected_BT: Tensor) -> float:
    """Average the selected values; NaN where none is selected."""
    chosen = values_BT[selected_BT]
    return float(chosen.mean()) if len(chosen) else math.nan


def _pad(rows: list[Tensor]) -> Tensor:
    """Pad rows on the right with zeros; [B, T]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
