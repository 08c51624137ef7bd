"""Names of a training step's metrics, as metrics.jsonl, trackers and curves have them, with their meaning.

The last word of a name says what is measured: ``*_tokens`` are counts, ``*_ce`` cross-entropies in nats a token at
temperature 1 (unless ``world.temperature`` says otherwise), ``*_share`` shares of 1, ``*_grad_norm`` L2 norms.
``NAME/PART`` is ``NAME`` for one tool or one ending. Of tokens, a mean over nothing is null.
"""

from __future__ import annotations

METRICS = {
    # Rollouts of the step; means are over those that have the thing in question.
    "reward": "mean, the verifier's own",
    "solved": "share of rewards of at least 1",
    "rollouts": "number",
    "no_reward": "rollouts without a reward",
    "failed": "rollouts in which the environment broke",
    "retries": "environments opened again after a failure",
    "role_confusion": "share of turns whose action holds the format of an observation",
    "groups_with_signal": "groups with unequal rewards; the others teach through the world-model term alone",
    "num_turns": "mean per rollout",
    "invalid_calls": "mean per rollout",
    "truncated_observations": "mean per rollout",
    "command_timeouts": "mean per rollout",
    "stop_reason": "share of rollouts with this ending",
    "staleness": "most updates between sampling and learning",
    "stale_rows": "rollouts too old for the policy term",
    "length_penalty": "mean of what was taken off rewards",
    # Losses, the terms before their coefficients.
    "policy_loss": "policy term",
    "world_model_loss": "world-model term",
    "total_loss": "both, with their coefficients",
    "world_model_coeff": "as used in this step",
    # Tokens.
    "sequences": "rows of the step",
    "rewarded_sequences": "rows with a reward",
    "action_tokens": "sampled by the policy",
    "policy_tokens": "those of rows with a reward",
    "env_output_tokens": "output of the environment",
    "warning_tokens": "warnings of the harness",
    "target_tokens": "learned by the world-model term",
    "context_share": "of all tokens",
    "template_share": "of all tokens",
    "action_share": "of all tokens",
    "env_output_share": "of all tokens",
    "warning_share": "of all tokens",
    "copied_share": "of environment output: text that stands in the turn's action too",
    "target_ce": "of target tokens",
    "env_output_ce": "of environment output; also by tool",
    "env_output_ce_copied": "of the part that stands in the turn's action too",
    "env_output_ce_new": "of the rest",
    "warning_ce": "of warnings",
    "template_ce": "of the scaffold, where it is learned",
    # Policy.
    "entropy": "of actions, nats a token: the mean of -log p, an estimate",
    "ratio_mean": "of p_trainer / p_sampler over action tokens of rows with a reward",
    "clip_fraction": "share of those tokens that are clipped",
    "reference_kl": "to the model that the run began with, nats, where kl_coeff > 0",
    "sampler_logprob_gap": "largest |trainer - sampler| on an action token, nats",
    # Balance of the two terms, and the update.
    "effective_obs_weight": "of one target token, relative to one action token",
    "world_pull_share": "of the world-model term in the L1 norm of d(loss)/d(logprobs)",
    "policy_grad_norm": "at the last hidden states (the logits of a model that caps them), where the terms do not mix",
    "world_grad_norm": "at the same place",
    "grad_norm_ratio": "the second over the first, in every step; biased: over the weights the ratio is several times "
    "larger, as policy gradients of either sign cancel between tokens there and those of a cross-entropy add up",
    # Exact, over all trained weights, every engine.measure_gradients_every steps; else null.
    "policy_grad_norm_weights": "of the policy term, policy_coeff included",
    "world_grad_norm_weights": "of the world-model term at coefficient 1, whatever its coefficient is",
    "world_grad_share": "w / (w + policy_grad_norm_weights), w = world_model_coeff * world_grad_norm_weights",
    "grad_cosine": "between both terms' gradients: below 0 they pull against each other",
    "grad_norm": "of all weights, before clipping",
    "learning_rate": "as used",
    "update_scale": "below 1 where a step of the world-model term alone is held back",
    "skipped": "1 where the weights did not change: no token carries weight, or the gradient is not finite",
    "alarms": "metrics in which the guard sees trouble, see backtalk.run.guard",
    # Time.
    "rollout_seconds": "of the step's rollouts",
    "train_seconds": "of its update",
    "sampling_share": "of the time that rollouts spent in all, waiting for siblings at the sampler included",
    "sandbox_share": "the rest",
    "tokens_per_second": "of the whole step",
    "action_tokens_per_second": "of its rollouts",
}
