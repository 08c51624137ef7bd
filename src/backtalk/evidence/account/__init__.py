"""Count what a rollout is made of, and what each objective would learn from it: RFC 010's accounting.

``report.account_of`` counts a rollout's tokens by who made them, and with log-probabilities of one forward pass gives
the losses of ordinary RL, of ECHO, and of the world term alone.
"""
