"""A sampler behind an OpenAI-compatible server, which is given an engine's weights and held against them."""
