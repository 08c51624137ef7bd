"""Run rollouts of a policy in environments, and record every token with who made it."""
