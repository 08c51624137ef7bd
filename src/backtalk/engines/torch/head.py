"""Language-model head in chunks: hidden states to log-probabilities of given tokens, without logits of all tokens.

The logits of all tokens are by far the largest tensor of a training step. Here they exist for a chunk of tokens at a
time, in one buffer that every chunk overwrites, and the backward pass computes them again. That costs one matrix
product more than keeping them: four instead of three. It is saved where the gradient is known in the forward pass:

- d(log p)/d(states) does not depend on the loss, so a frozen head (LoRA) recomputes nothing.
- A cross-entropy is linear in log p, so its gradient is known before: the caller may pass it as ``grad_hint_N``. The
  backward pass adds what the hint missed, so a wrong hint costs time and changes no result.

N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Elements of a logits buffer: 256 MiB of float32. There are two, the logits and their log-softmax.
MAX_LOGITS = 2**26


def head_logprobs(
    states_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    token_ids_N: Tensor,
    temperature_N: Tensor,
    grad_hint_N: Tensor | None = None,
) -> Tensor:
    """Compute log_softmax((states @ weight.T + bias) / temperature) at ``token_ids_N``, in nats; float32 or wider, [N].

    ``grad_hint_N`` is d(loss)/d(result) where it is known already, else 0. A right hint makes the backward pass
    cheaper; no hint changes a result.
    """
    if torch.is_grad_enabled() and (states_ND.requires_grad or weight_VD.requires_grad):
        return _HeadLogprobs.apply(states_ND, weight_VD, bias_V, token_ids_N, temperature_N, grad_hint_N)
    head = _Head(states_ND, weight_VD, bias_V, token_ids_N, temperature_N)
    logprobs_N = head.empty(len(states_ND))
    for rows_C, logprobs_CV in head.chunks(torch.arange(len(states_ND), device=states_ND.device)):
        logprobs_N[rows_C] = head.chosen(logprobs_CV, rows_C)
    return logprobs_N


@torch.no_grad()
def head_top(
    states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_ids_N: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities at ``token_ids_N``, [N], and the ``k`` likeliest tokens and theirs, [N, k], in nats."""
    head = _Head(states_ND, weight_VD, bias_V, token_ids_N, torch.ones(len(states_ND), device=states_ND.device))
    logprobs_N, top_NK = head.empty(len(states_ND)), head.empty(len(states_ND), k)
    top_ids_NK = torch.empty_like(top_NK, dtype=torch.int64)
    for rows_C, logprobs_CV in head.chunks(torch.arange(len(states_ND), device=states_ND.device)):
        logprobs_N[rows_C] = head.chosen(logprobs_CV, rows_C)
        top_NK[rows_C], top_ids_NK[rows_C] = logprobs_CV.topk(k, -1)
    return logprobs_N, top_ids_NK, top_NK


class _Head:
    """The inputs of one call, and the sums of their gradients."""

    def __init__(
        self, states_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, token_ids_N: Tensor, temperature_N: Tensor
    ) -> None:
        self.states_ND, self.weight_VD, self.bias_V = states_ND.detach(), weight_VD.detach(), bias_V
        self.token_ids_N, self.temperature_N = token_ids_N, temperature_N
        self.dtype = torch.float64 if states_ND.dtype == torch.float64 else torch.float32
        self.is_tempered = bool((temperature_N != 1).any())
        self.grad_states_ND = self.grad_weight_VD = self.grad_bias_V = None

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.states_ND.device)

    def chosen(self, logprobs_CV: Tensor, rows_C: Tensor) -> Tensor:
        return logprobs_CV.gather(-1, self.token_ids_N[rows_C, None])[:, 0]

    def chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows in chunks, with log p of the whole vocabulary in a buffer that the next chunk overwrites."""
        vocab_size = len(self.weight_VD)
        size = min(len(rows), max(MAX_LOGITS // vocab_size, 1))
        if size == 0:
            return
        logits_CV, logprobs_CV = self.empty(size, vocab_size), self.empty(size, vocab_size)
        for rows_C in rows.split(size):
            logits, logprobs = logits_CV[: len(rows_C)], logprobs_CV[: len(rows_C)]
            if self.states_ND.dtype == self.dtype:
                torch.mm(self.states_ND[rows_C], self.weight_VD.t(), out=logits)
                if self.bias_V is not None:
                    logits += self.bias_V
            else:
                logits.copy_(functional.linear(self.states_ND[rows_C], self.weight_VD, self.bias_V))
            if self.is_tempered:
                logits /= self.temperature_N[rows_C, None].to(self.dtype)
            torch.log_softmax(logits, -1, out=logprobs)
            yield rows_C, logprobs

    def start_gradients(self, states: bool, weight: bool, bias: bool) -> None:
        """Start the sums of the gradients that are needed at 0."""
        self.grad_states_ND = torch.zeros_like(self.states_ND) if states else None
        self.grad_weight_VD = torch.zeros_like(self.weight_VD, dtype=self.dtype) if weight else None
        self.grad_bias_V = torch.zeros_like(self.bias_V, dtype=self.dtype) if bias and self.bias_V is not None else None

    def add_gradient(self, rows_C: Tensor, logprobs_CV: Tensor, grad_C: Tensor) -> None:
        """Add the gradients that follow from ``grad_C``, d(loss)/d(log p) of these rows. Overwrites ``logprobs_CV``."""
        grad_C = grad_C.to(self.dtype)
        if self.is_tempered:
            grad_C = grad_C / self.temperature_N[rows_C].to(self.dtype)
        # d(loss)/d(logits) = grad * (one-hot - p)
        grad_CV = logprobs_CV.exp_().mul_(-grad_C[:, None])
        grad_CV[torch.arange(len(rows_C), device=rows_C.device), self.token_ids_N[rows_C]] += grad_C
        if self.grad_bias_V is not None:
            self.grad_bias_V += grad_CV.sum(0)
        grad_CV = grad_CV.to(self.states_ND.dtype)
        if self.grad_states_ND is not None:
            self.grad_states_ND[rows_C] += grad_CV @ self.weight_VD
        if self.grad_weight_VD is None:
            return
        if grad_CV.dtype == self.dtype:
            self.grad_weight_VD.addmm_(grad_CV.t(), self.states_ND[rows_C])
        else:
            self.grad_weight_VD += grad_CV.t() @ self.states_ND[rows_C]

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the sums, in the types of their tensors."""
        weight, bias = self.grad_weight_VD, self.grad_bias_V
        return (
            self.grad_states_ND,
            None if weight is None else weight.to(self.weight_VD.dtype),
            None if bias is None or self.bias_V is None else bias.to(self.bias_V.dtype),
        )


class _HeadLogprobs(torch.autograd.Function):
    """``head_logprobs`` with its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_ids_N: Tensor,
        temperature_N: Tensor,
        grad_hint_N: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(states_ND, weight_VD, bias_V, token_ids_N, temperature_N)
        head = _Head(states_ND, weight_VD, bias_V, token_ids_N, temperature_N)
        head.start_gradients(*ctx.needs_input_grad[:3])
        logprobs_N = head.empty(len(states_ND))
        ctx.is_frozen = not any(ctx.needs_input_grad[1:3])
        if ctx.is_frozen:
            grad_hint_N = torch.ones_like(logprobs_N)  # the backward pass scales it
        elif grad_hint_N is None:
            grad_hint_N = torch.zeros_like(logprobs_N)
        for rows_C, logprobs_CV in head.chunks(grad_hint_N.nonzero()[:, 0]):
            logprobs_N[rows_C] = head.chosen(logprobs_CV, rows_C)
            head.add_gradient(rows_C, logprobs_CV, grad_hint_N[rows_C])
        last = None
        for rows_C, logprobs_CV in head.chunks((grad_hint_N == 0).nonzero()[:, 0]):
            logprobs_N[rows_C] = head.chosen(logprobs_CV, rows_C)
            last = rows_C, logprobs_CV  # still in the buffer in the backward pass
        ctx.head, ctx.grad_hint_N, ctx.last = head, grad_hint_N, last
        return logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        head, grad_hint_N, last = ctx.head, ctx.grad_hint_N, ctx.last
        ctx.head = ctx.last = None
        if head is None:  # a second backward pass over a graph that was retained
            head = _Head(*ctx.saved_tensors)
            head.start_gradients(*ctx.needs_input_grad[:3])
            grad_hint_N, last = torch.zeros_like(grad_hint_N), None
        elif ctx.is_frozen:
            return head.grad_states_ND * grad_N[:, None].to(head.states_ND.dtype), None, None, None, None, None
        missing_N = grad_N.to(grad_hint_N.dtype) - grad_hint_N
        if last is not None and bool(missing_N[last[0]].any()):
            rows_C, logprobs_CV = last
            head.add_gradient(rows_C, logprobs_CV, missing_N[rows_C])
            missing_N[rows_C] = 0
            del logprobs_CV
        del last
        for rows_C, logprobs_CV in head.chunks(missing_N.nonzero()[:, 0]):
            head.add_gradient(rows_C, logprobs_CV, missing_N[rows_C])
        return *head.gradients(), None, None, None
