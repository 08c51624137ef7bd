"""Compare training runs: studies of arms and seeds with intervals, and the account of what an objective trains."""
