"""Render messages to tokens, with the role of each token, and parse sampled tokens into tool calls."""
