"""Log-probabilities of the tokens that are there, from one forward pass.

The vocabulary-wide part (head and log-softmax) runs only where a number is needed: with a graph on trained
positions, without one on positions that are measured. Rows are padded on the right and attention is causal,
so padding comes after every real token and no mask is needed.

B sequences, T tokens, D hidden size, V vocabulary, N selected positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Logits held at once, in elements: 256 MiB of float32. More positions are done in chunks, whose logits are
# computed again in the backward pass instead of kept.
MAX_LOGITS = 2**26


def token_logprobs(
    model: Any, token_ids_BT: Tensor, trained_BT: Tensor, measured_BT: Tensor, temperature_BT: Tensor, head_apart: bool
) -> Tensor:
    """log p(token t | tokens before t) in nats where either mask says so, 0 elsewhere; float32 or wider, [B, T].

    Gradients flow through ``trained_BT`` alone. The first token has nothing before it, so column 0 is always 0.
    ``head_apart`` comes from ``has_separate_head``.
    """
    trained_BT = trained_BT.clone()
    trained_BT[:, 0] = False
    measured_BT = measured_BT & ~trained_BT
    measured_BT[:, 0] = False
    trains = torch.is_grad_enabled() and bool(trained_BT.any())
    with torch.set_grad_enabled(trains):
        if head_apart:
            states = model.get_decoder()(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        else:
            states = model(input_ids=token_ids_BT, use_cache=False).logits
    head: Any = model.get_output_embeddings() if head_apart else torch.nn.Identity()
    vocab_size: int = head.weight.shape[0] if head_apart else states.shape[-1]

    def scattered(selected_BT: Tensor) -> Tensor:
        rows_N, columns_N = selected_BT.nonzero(as_tuple=True)
        logprobs_N = _chunked(
            head,
            states[rows_N, columns_N - 1],
            token_ids_BT[rows_N, columns_N],
            temperature_BT[rows_N, columns_N],
            max(MAX_LOGITS // vocab_size, 1),
        )
        zeros_BT = torch.zeros(token_ids_BT.shape, dtype=logprobs_N.dtype, device=logprobs_N.device)
        return zeros_BT.index_put((rows_N, columns_N), logprobs_N)

    with torch.set_grad_enabled(trains):
        logprobs_BT = scattered(trained_BT)
    if measured_BT.any():
        with torch.no_grad():
            measured = scattered(measured_BT)
        logprobs_BT = logprobs_BT + measured
    return logprobs_BT


def _chunked(head: Any, states_ND: Tensor, token_ids_N: Tensor, temperature_N: Tensor, size: int) -> Tensor:
    if len(states_ND) <= size:
        return _head_logprobs(head, states_ND, token_ids_N, temperature_N)
    parts = []
    for chunk in zip(states_ND.split(size), token_ids_N.split(size), temperature_N.split(size), strict=True):
        if torch.is_grad_enabled() and states_ND.requires_grad:
            parts.append(checkpoint(_head_logprobs, head, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_head_logprobs(head, *chunk))
    return torch.cat(parts)


def _head_logprobs(head: Any, states_ND: Tensor, token_ids_N: Tensor, temperature_N: Tensor) -> Tensor:
    logits_NV = head(states_ND)
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    if bool((temperature_N != 1).any()):
        logits_NV = logits_NV / temperature_N[:, None].to(logits_NV.dtype)
    return -functional.cross_entropy(logits_NV, token_ids_N, reduction="none")


@torch.no_grad()
def has_separate_head(model: Any) -> bool:
    """Whether the logits are just the output embedding applied to the decoder's last hidden state.

    Some models scale or cap them after that. Tried on a few tokens: if the two ways differ by a bit, every
    log-probability goes through the model's own forward pass, which is right and takes more memory.
    """
    head = model.get_output_embeddings()
    text_config = model.config.get_text_config()
    if head is None or getattr(text_config, "final_logit_softcapping", None):
        return False
    device = next(model.parameters()).device
    token_ids_BT = torch.arange(8, device=device)[None] % head.weight.shape[0]
    try:
        states = model.get_decoder()(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        return torch.equal(head(states), model(input_ids=token_ids_BT, use_cache=False).logits)
    except (AttributeError, TypeError, RuntimeError):
        return False
