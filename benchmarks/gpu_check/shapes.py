"""Shapes of published models, with what a training step of them should cost: operations, bytes, and random weights.

Operations are those of the model, as MFU counts them: 2 for each multiply-add, a backward pass of twice the forward
pass, and nothing for what is computed a second time. Attention is causal, so half of its square counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A decoder as Qwen3 builds it. ``lora_rank`` above 0 trains adapters on its linear layers alone."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocab: int
    tied: bool = True
    lora_rank: int = 0

    @property
    def _linears(self) -> list[tuple[int, int]]:
        """Return the inputs and outputs of the linear layers of one block."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden)]

    @property
    def body(self) -> int:
        """Return the weights of all blocks' linear layers, which every token passes."""
        return self.layers * sum(a * b for a, b in self._linears)

    @property
    def head(self) -> int:
        """Return the weights of the language-model head."""
        return self.hidden * self.vocab

    @property
    def adapters(self) -> int:
        """Return the weights of the adapters."""
        return self.layers * sum(self.lora_rank * (a + b) for a, b in self._linears)

    @property
    def parameters(self) -> int:
        """Return all weights without the norms', which are few; adapters apart."""
        return self.body + self.head * (1 if self.tied else 2)

    def attention_operations(self, tokens: int, length: int) -> float:
        """Return the operations of causal attention in a step over ``tokens`` tokens in rows of ``length``."""
        return 3 * 2.0 * self.layers * self.heads * self.head_size * length * tokens

    def step_operations(self, tokens: int, length: int, scored: int) -> float:
        """Return the operations of forward and backward; ``scored`` tokens pass the head."""
        passes = 2 if self.lora_rank else 3  # frozen weights have no gradient of their own
        linear = 2.0 * passes * (self.body * tokens + self.head * scored) + 6.0 * self.adapters * tokens
        return linear + self.attention_operations(tokens, length)

    @property
    def decode_bytes(self) -> int:
        """Return the bytes of weights in bf16 that one step of decoding reads, whatever the number of rows."""
        return 2 * (self.body + self.head)

    def state_bytes(self, weight_bytes: int) -> int:
        """Return the bytes of weights, gradients and AdamW's state.

        Weights below float32 have float32 masters, whose gradient is summed beside the weights' own.
        """
        if self.lora_rank:  # float32 adapters: weight, gradient, two moments
            return weight_bytes * self.parameters + 16 * self.adapters
        return (16 if weight_bytes >= 4 else 2 + 4 + 8 + 4 + 2) * self.parameters

    def activation_bytes(self, weight_bytes: int) -> int:
        """Return the bytes that one block keeps of a token for its backward pass, as transformers writes Qwen3.

        A norm keeps its input in float32 and its result; attention its input, queries, keys and values before and
        after their norms and rotation, and its result; the MLP its input and four tensors of its width.
        """
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        wide = 4  # of a norm's input
        norms = 2 * (wide + 2 * weight_bytes) * self.hidden + (wide + weight_bytes) * (queries + keys)
        attention = weight_bytes * (2 * queries + 2 * keys)
        return norms + attention + 4 * weight_bytes * self.mlp

    def step_bytes(self, weight_bytes: int, tokens: int, *, checkpointing: bool) -> int:
        """Return the largest memory of a step in micro-batches of ``tokens`` tokens, buffers of the head included.

        Two moments compete: the head's, and the backward pass of the last block's MLP, which holds two gradients of
        its width. A block that is computed again is there in the second alone.
        """
        block = self.activation_bytes(weight_bytes)
        kept = self.layers * (weight_bytes * self.hidden if checkpointing else block)
        logits = 4 * min(2**26, tokens * self.vocab)  # of a buffer, of which there are two
        head = 2 * logits + (0 if self.lora_rank else 4 * self.head)  # the weights' gradient
        mlp = tokens * (2 * weight_bytes * self.mlp + (block if checkpointing else 0))
        return self.state_bytes(weight_bytes) + kept * tokens + max(head, mlp)

    def config(self) -> Any:
        """Return the configuration of transformers."""
        from transformers import Qwen3Config

        return Qwen3Config(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            intermediate_size=self.mlp,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=65_536,
        )

    def random_model(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return a model with random weights, made on the device."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(self.config(), dtype=dtype).eval()


# SmolLM2-135M, Qwen3-0.6B, Qwen2.5-1.5B and Qwen3-8B in size; all in Qwen3's form.
SMOL = Shape(name="0.1B", hidden=576, layers=30, heads=9, kv_heads=3, head_size=64, mlp=1536, vocab=49_152)
SMALL = Shape(name="0.6B", hidden=1024, layers=28, heads=16, kv_heads=8, head_size=128, mlp=3072, vocab=151_936)
MIDDLE = Shape(name="1.5B", hidden=1536, layers=28, heads=12, kv_heads=2, head_size=128, mlp=8960, vocab=151_936)
LARGE = Shape(
    name="8B LoRA", hidden=4096, layers=36, heads=32, kv_heads=8, head_size=128, mlp=12_288, vocab=151_936,
    tied=False, lora_rank=16,
)  # fmt: skip
TINY = Shape(name="2M", hidden=128, layers=4, heads=4, kv_heads=2, head_size=32, mlp=384, vocab=8192)
TINY_LORA = Shape(
    name="2M LoRA", hidden=128, layers=4, heads=4, kv_heads=2, head_size=32, mlp=384, vocab=8192, lora_rank=4
)
