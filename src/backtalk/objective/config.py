"""Settings of the objective: both terms, their coefficients, denominators and published variants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from backtalk.errors import ConfigError
from backtalk.objective.advantages import AdvantageEstimator
from backtalk.objective.coefficient import Schedule, Share
from backtalk.objective.roles import TARGET_ROLES, WorldLossTarget
from backtalk.settings import check_choices

PolicyLoss = Literal["clip", "gspo", "cispo"]
WorldLoss = Literal["cross_entropy", "clipped_mae"]
PolicyNormalizer = Literal["sequence_mean", "token_mean", "fixed_length"]
WorldNormalizer = Literal["sequence_mean", "sequence_mean_selected", "token_mean", "fixed_length"]
ZeroAdvantageSteps = Literal["scaled", "full"]
OnTrouble = Literal["warn", "halve", "off"]
Conflict = Literal["keep", "project"]
Head = Literal["train", "keep"]
EntropyWeights = Literal["equal", "negative"]
Observations = Literal["own", "shuffled", "action_masked"]

ROLE_NAMES = {target: tuple(role.name.lower() for role in roles) for target, roles in TARGET_ROLES.items()}
NO_PROJECTION = (
    "world.conflict='project' needs an engine that measures both terms' gradients; use engine.kind=torch with "
    "engine.measure_gradients_every above 0, or world.conflict=keep"
)
NO_KEPT_HEAD = (
    "world.head='keep' needs an engine that applies the output embedding itself, to the last hidden states; use "
    "engine.kind=torch with a model whose logits are a linear map of these and nothing more, or world.head=train"
)
NO_SHARE = (
    "world_model_coeff is a share of the gradient, which only an engine that measures both terms' gradients can turn "
    "into a number; use engine.kind=torch with engine.measure_gradients_every above 0, or a number, for example 0.05"
)
TOOL_PREFIX = "tool:"  # of a tool's name in WorldOptions.weights


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthPenalty:
    """A penalty on long rollouts, taken off the reward before advantages; the recorded reward stays the verifier's.

    With ``max_penalty`` infinite it is echo-rl's. DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4), from
    0 at L_max - L_cache to -1 at L_max, has max_penalty = 1, free_tokens = L_max - L_cache and per_1000_tokens =
    1000 / L_cache.
    """

    per_1000_tokens: float = 0.0
    """Reward taken off for each 1,000 tokens; 0 is no penalty."""
    free_tokens: int = 0
    """Number of tokens without a penalty."""
    max_penalty: float = 1.0
    """Largest penalty; inf for no bound."""

    def __post_init__(self) -> None:
        if not (0 <= self.per_1000_tokens < math.inf and self.free_tokens >= 0 and self.max_penalty > 0):
            raise ConfigError(
                f"policy.length_penalty has per_1000_tokens={self.per_1000_tokens}, free_tokens={self.free_tokens}, "
                f"max_penalty={self.max_penalty}, which would reward length, or do nothing; use >= 0, >= 0 and > 0"
            )

    def for_length(self, tokens: int) -> float:
        """Return the penalty for a number of tokens after the prompt: actions, observations and their scaffold."""
        return min(self.max_penalty, self.per_1000_tokens * max(0, tokens - self.free_tokens) / 1000)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOptions:
    """Variants of the policy term. The default is GRPO without KL."""

    loss: PolicyLoss = "clip"
    """Form of the policy term."""
    advantage: AdvantageEstimator = "grpo"
    """Estimator of advantages within a group."""
    kl_coeff: float = 0.0
    """Weight of KL(policy || reference); the reference is the model that the run began with."""
    max_importance_ratio: float | None = None
    """Cap of p_trainer / p_sampler, for truncated importance sampling; null applies no correction."""
    max_staleness: int = 0
    """Most updates since a rollout was sampled; older rollouts carry the world-model term alone."""
    length_penalty: LengthPenalty = field(default_factory=LengthPenalty)

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.kl_coeff < math.inf:
            raise ConfigError(f"policy.kl_coeff={self.kl_coeff} rewards leaving the reference; use >= 0, 0 for no KL")
        if self.max_staleness < 0:
            raise ConfigError(f"policy.max_staleness={self.max_staleness} would refuse fresh rows; use 0 or more")
        if self.max_importance_ratio is None:
            return
        if not 1 <= self.max_importance_ratio < math.inf:
            raise ConfigError(
                f"policy.max_importance_ratio={self.max_importance_ratio} cuts tokens on which trainer and sampler "
                "agree; use >= 1, for example 2"
            )
        if self.loss == "gspo":
            raise ConfigError(
                "policy.max_importance_ratio corrects token by token, and policy.loss='gspo' has one ratio a sequence; "
                "use loss='clip' or 'cispo', or no cap"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldOptions:
    """Options of the world-model term, beyond ``world_loss_target``. The default is ECHO's: all targets weigh the same.

    None of these settings changes a denominator other than the count of target tokens: a row whose targets are all
    deselected adds 0 and stays in the mean.
    """

    weights: Mapping[str, float] | None = None
    """Weights of target tokens by role (env_output, warning, template) or by tool (tool:NAME); 1 where not named."""
    max_tokens_per_observation: int | None = None
    """Learn only this many target tokens of each turn, the first ones; null is all."""
    min_valid_calls: float = 0.0
    """Gate: share of a rollout's turns that held a valid call."""
    min_clean_turns: float = 0.0
    """Gate: share of a rollout's turns that parsed without any warning."""
    min_correct: float = 0.0
    """Gate: share of solved rollouts among those of a group that feed the term."""
    loss: WorldLoss = "cross_entropy"
    """Loss of a target token; clipped_mae is PaW's."""
    entropy_share: float = 1.0
    """PaW: share of a group's turns, of highest action entropy, that keep their observation."""
    entropy_weights: EntropyWeights = "equal"
    """Weight of each turn's observation: equal, or negative, exp(-action entropy) with a mean of 1 (after SOAR)."""
    drop_surprising: float = 0.0
    """Share of the step's target tokens, the most surprising ones, that are not learned; 0 learns all."""
    return_adaptive: bool = False
    """PaW: multiply by 1 - the group's mean reward."""
    temperature: Literal["one", "sampling"] = "one"
    """Temperature of the log-probabilities of target tokens: 1, or that of sampling."""
    zero_advantage_steps: ZeroAdvantageSteps = "scaled"
    """Update of a step whose advantages are all 0: scaled by world_model_coeff, or a full step of the optimizer."""
    every: int = 1
    """The term is in every so many-th step only; the others are the policy term's alone (after TAPO)."""
    conflict: Conflict = "keep"
    """The term's gradient where it points against the policy term's: keep it, or project it off (PCGrad)."""
    head: Head = "train"
    """The term's gradient into the output embedding: train it too, or keep it off."""
    observations: Observations = "own"
    """Observations learned after an action: its own; as controls: shuffled, those of other actions of the step, or
    action_masked, its own after an empty action."""
    on_trouble: OnTrouble = "warn"
    """What an alarm does (a large share of the gradient, invalid calls, ...): warn, and halve world_model_coeff, or
    switch it off."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("min_valid_calls", "min_clean_turns"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"world.{name}={getattr(self, name)} is a share of turns; use 0 to 1, 0 for no gate")
        if not 0 <= self.min_correct < 1:
            raise ConfigError(
                f"world.min_correct={self.min_correct} would learn from solved rollouts alone, and from none where "
                "tasks are hard; use 0 <= min_correct < 1, 0 for no gate"
            )
        if not 0 < self.entropy_share <= 1:
            raise ConfigError(f"world.entropy_share={self.entropy_share} keeps no observation; use 0 < share <= 1")
        if not 0 <= self.drop_surprising < 1:
            raise ConfigError(
                f"world.drop_surprising={self.drop_surprising} leaves nothing to learn; use 0 <= share < 1, 0 for all"
            )
        if self.every < 1:
            raise ConfigError(f"world.every={self.every} is no number of steps; use 1 for the term in every step")
        cap = self.max_tokens_per_observation
        if cap is not None and cap < 1:
            raise ConfigError(f"world.max_tokens_per_observation={cap} leaves nothing; use >= 1, or null for all")
        for name, weight in (self.weights or {}).items():
            if name not in ROLE_NAMES["full_observation"] and not name.startswith(TOOL_PREFIX):
                raise ConfigError(
                    f"world.weights names {name!r}, which is no role; "
                    f"use env_output, warning, template or {TOOL_PREFIX}NAME"
                )
            if not 0 <= weight < math.inf:
                raise ConfigError(f"world.weights gives {name!r} {weight}; use a finite weight >= 0")

    def changed(self, names: Iterable[str]) -> list[str]:
        """Return the names whose options are not at their defaults."""
        default = WorldOptions()
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def weight(self, role: str, tool: str | None) -> float:
        """Return the weight of a target token of a role, in the observation of a tool."""
        weights = self.weights or {}
        return weights.get(role, 1.0) * weights.get(f"{TOOL_PREFIX}{tool}", 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Settings of the objective, policy_coeff * policy term + world_model_coeff * world-model term."""

    policy_coeff: float = 1.0
    """0 learns from observations alone and needs no verifier."""
    world_model_coeff: float | Schedule | Share = 0.05
    """Lambda: a number, a schedule {points: {0: 0.05, 100: 0}, shape: linear or steps}, or a {share: 0.2} of the
    gradient over the weights."""
    clip: tuple[float, float] = (0.2, 0.2)
    """eps_low, eps_high of the ratio."""
    policy_normalizer: PolicyNormalizer = "sequence_mean"
    """Denominator of the policy term."""
    world_normalizer: WorldNormalizer = "sequence_mean"
    """Denominator of the world-model term."""
    world_loss_target: WorldLossTarget = "env_only"
    """Token roles that the world-model term learns."""
    max_seq_len: int | None = None
    """Tokens, the L of fixed_length and used for nothing else; null in a run is rollout.max_tokens."""
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    world: WorldOptions = field(default_factory=WorldOptions)

    def __post_init__(self) -> None:
        coeff = self.world_model_coeff
        coefficients = (self.policy_coeff, coeff.largest if isinstance(coeff, Schedule | Share) else coeff)
        if not all(0 <= c < math.inf for c in coefficients) or not any(coefficients):
            raise ConfigError(
                f"policy_coeff={self.policy_coeff}, world_model_coeff={self.world_model_coeff}: a negative coefficient "
                "reverses its gradient, and two zeros leave nothing to learn; use >= 0 and one of them above 0"
            )
        if isinstance(coeff, Schedule) and self.policy_coeff == 0:
            raise ConfigError(
                "policy_coeff=0 with a schedule of world_model_coeff: the optimizer takes the scale of a lone term out "
                "again; use a constant, and schedule the learning rate instead"
            )
        if self.world.every > 1 and self.policy_coeff == 0:
            raise ConfigError(
                f"policy_coeff=0 with world.every={self.world.every} leaves other steps nothing to learn; use every=1"
            )
        if isinstance(coeff, Share) and self.policy_coeff == 0:
            raise ConfigError(
                "policy_coeff=0 with a share of world_model_coeff: the world-model term is then all of the gradient; "
                "use a number, for example world_model_coeff=1"
            )
        eps_low, eps_high = self.clip
        if not (0 <= eps_low <= 1 and 0 <= eps_high < math.inf):
            raise ConfigError(f"clip={list(self.clip)}: use [eps_low, eps_high], 0 <= eps_low <= 1, eps_high >= 0")
        check_choices(self)
        if "fixed_length" in (self.policy_normalizer, self.world_normalizer):
            require_max_seq_len(self.max_seq_len)
        roles = ROLE_NAMES[self.world_loss_target]
        unused = [name for name in self.world.weights or {} if name not in roles and not name.startswith(TOOL_PREFIX)]
        if unused:
            raise ConfigError(
                f"world.weights names {unused}, which world_loss_target={self.world_loss_target!r} never selects; "
                "leave them out, or choose a target that holds them"
            )
        if not any(self.world.weight(role, None) for role in roles):
            raise ConfigError(
                f"world.weights are 0 for everything that world_loss_target={self.world_loss_target!r} selects; "
                "use world_model_coeff=0 to switch the term off"
            )

    def at(self, step: int) -> ObjectiveConfig:
        """Return a copy with the coefficient of a training step, counted from 0, in place of a schedule.

        A share stays: an engine that measures gradients puts the coefficient of the step in its place. Between the
        steps of ``world.every`` it is 0.
        """
        if (step + 1) % self.world.every:
            return replace(self, world_model_coeff=0.0)
        if not isinstance(self.world_model_coeff, Schedule):
            return self
        return replace(self, world_model_coeff=self.world_model_coeff.at(step))

    def times(self, factor: float) -> ObjectiveConfig:
        """Return a copy with ``factor`` (0 to 1) times the coefficient, be it a number, a schedule or a share."""
        coeff = self.world_model_coeff
        lower = coeff.times(factor) if isinstance(coeff, Schedule | Share) else coeff * factor
        return replace(self, world_model_coeff=lower)

    def has_world_term(self, step: int) -> bool:
        """Return whether the world-model term has a coefficient, or a share, above 0 at a training step."""
        coeff = self.at(step).world_model_coeff
        return (coeff.at(step) if isinstance(coeff, Schedule | Share) else coeff) > 0

    @property
    def world_coeff(self) -> float:
        """Return ``world_model_coeff`` as a number.

        Raises:
            ConfigError: it is a schedule, so it depends on the step, or a share, so it depends on gradients.
        """
        match self.world_model_coeff:
            case Schedule():
                raise ConfigError("world_model_coeff is a schedule, which has no one value; pass config.at(step)")
            case Share():
                raise ConfigError(NO_SHARE)
            case number:
                return number


def require_max_seq_len(max_seq_len: int | None) -> int:
    """Return ``max_seq_len``; ConfigError where it is None or below 1, so that it cannot be a denominator."""
    if max_seq_len is None or max_seq_len < 1:
        raise ConfigError(
            f"normalizer 'fixed_length' divides by max_seq_len, got {max_seq_len}; "
            "set it to the longest sequence that a rollout may reach, in tokens"
        )
    return max_seq_len
