"""Engines: what holds a policy, samples from it and trains it."""
