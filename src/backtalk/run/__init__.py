"""Train, evaluate, serve and track a policy, and keep all of it in a run folder."""
