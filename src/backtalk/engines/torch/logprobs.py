"""Log-probabilities of given tokens, from one forward pass of a model of transformers.

The head (``head``) runs only where a number is needed: with a graph on trained tokens, without one on tokens that are
only measured. Samples are padded on the right and attention is causal, so padding comes after every real token and no
mask is needed.

B samples, T tokens, D hidden size, V vocabulary, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backtalk.engines.torch.head import head_logprobs, head_top
from backtalk.engines.torch.packing import Layout, packing_isolates_samples


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities, and the tensors whose gradients metrics read after the backward pass."""

    logprobs_BT: Tensor  # nats, 0 where neither trained nor measured; float32 or wider
    trained_BT: Tensor  # bool, tokens with a gradient
    states_ND: Tensor | None  # last hidden state before each trained token, in order; None where there is no graph

    def keep_gradients(self) -> Scores:
        """Make both tensors retain their ``.grad`` in the backward pass."""
        for tensor in (self.logprobs_BT, self.states_ND):
            if tensor is not None and tensor.requires_grad:
                tensor.retain_grad()
        return self


class TokenScorer:
    """A causal language model of transformers as a function from tokens to their log-probabilities.

    ``has_separate_head`` and, if asked for, ``packing_isolates_samples`` are tried once, at the start.
    """

    def __init__(self, model: Any, *, try_packing: bool) -> None:
        self.model = model
        self.has_separate_head = has_separate_head(model)
        self.packs = try_packing and packing_isolates_samples(model)

    def scores(
        self,
        token_ids_BT: Tensor,
        lengths_B: Tensor,
        row_sizes: Sequence[int],
        *,
        trained_BT: Tensor,
        measured_BT: Tensor,
        temperature_BT: Tensor,
        grad_hint_BT: Tensor | None = None,
        head_kept_BT: Tensor | None = None,
    ) -> Scores:
        """Compute log p(token t | tokens before t) where either mask is set, with a gradient where ``trained_BT`` is.

        The first token has no tokens before it, so column 0 is always 0. ``row_sizes``: see ``Layout``.
        ``grad_hint_BT``: d(loss)/d(logprobs) where it is known already, see ``head_logprobs``. The gradient of
        tokens in ``head_kept_BT`` does not reach the head, which the model must have (``has_separate_head``).
        """
        inner_BT = torch.ones_like(trained_BT)
        inner_BT[:, 0] = False
        trained_BT, measured_BT = trained_BT & inner_BT, measured_BT & ~trained_BT & inner_BT
        trains = torch.is_grad_enabled() and bool(trained_BT.any())
        layout = Layout.of(token_ids_BT, lengths_B, row_sizes)
        with torch.set_grad_enabled(trains):
            states_RLD = self._states(layout)

        def selected(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
            b_N, t_N = mask_BT.nonzero(as_tuple=True)
            states_ND = states_RLD[layout.rows_B[b_N], layout.starts_B[b_N] + t_N - 1]
            grad_hint_N = None if grad_hint_BT is None else grad_hint_BT[mask_BT]
            kept_N = None if head_kept_BT is None else head_kept_BT[mask_BT]
            logprobs_N = self._head(states_ND, token_ids_BT[mask_BT], temperature_BT[mask_BT], grad_hint_N, kept_N)
            zeros_BT = torch.zeros(mask_BT.shape, dtype=logprobs_N.dtype, device=logprobs_N.device)
            return states_ND, zeros_BT.index_put((b_N, t_N), logprobs_N)

        with torch.set_grad_enabled(trains):
            states_ND, logprobs_BT = selected(trained_BT)
        if bool(measured_BT.any()):
            with torch.no_grad():
                _, measured = selected(measured_BT)
            logprobs_BT = logprobs_BT + measured
        return Scores(logprobs_BT, trained_BT, states_ND if trains else None)

    @torch.no_grad()
    def likeliest(
        self, token_ids_BT: Tensor, lengths_B: Tensor, row_sizes: Sequence[int], mask_BT: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the tokens in ``mask_BT``, [N], and the ``k`` likeliest at each, [N, k], twice.

        The second is the tokens, the third their log-probabilities. The mask leaves out column 0.
        """
        layout = Layout.of(token_ids_BT, lengths_B, row_sizes)
        b_N, t_N = mask_BT.nonzero(as_tuple=True)
        states_ND = self._states(layout)[layout.rows_B[b_N], layout.starts_B[b_N] + t_N - 1]
        token_ids_N = token_ids_BT[mask_BT]
        if self.has_separate_head:
            head = self.model.get_output_embeddings()
            return head_top(states_ND, head.weight, head.bias, token_ids_N, k)
        logprobs_NV = torch.log_softmax(states_ND if states_ND.dtype == torch.float64 else states_ND.float(), -1)
        top_NK, top_ids_NK = logprobs_NV.topk(k, -1)
        return logprobs_NV.gather(-1, token_ids_N[:, None])[:, 0], top_ids_NK, top_NK

    def _states(self, layout: Layout) -> Tensor:
        """Return the last hidden states, or the logits of a model without a separate head; [R, L, D or V]."""
        if self.has_separate_head:
            return self.model.get_decoder()(**layout.model_input()).last_hidden_state
        return self.model(**layout.model_input()).logits

    def _head(
        self,
        states_ND: Tensor,
        token_ids_N: Tensor,
        temperature_N: Tensor,
        grad_hint_N: Tensor | None,
        kept_N: Tensor | None,
    ) -> Tensor:
        if not self.has_separate_head:
            logits_NV = states_ND if states_ND.dtype == torch.float64 else states_ND.float()
            logits_NV = logits_NV / temperature_N[:, None].to(logits_NV.dtype)
            return -functional.cross_entropy(logits_NV, token_ids_N, reduction="none")
        head = self.model.get_output_embeddings()
        if kept_N is None or not bool(kept_N.any()):
            return head_logprobs(states_ND, head.weight, head.bias, token_ids_N, temperature_N, grad_hint_N)

        def scored(rows: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
            hint_N = None if grad_hint_N is None else grad_hint_N[rows]
            return head_logprobs(states_ND[rows], weight_VD, bias_V, token_ids_N[rows], temperature_N[rows], hint_N)

        kept, others = kept_N.nonzero()[:, 0], (~kept_N).nonzero()[:, 0]
        parts = [scored(kept, head.weight.detach(), None if head.bias is None else head.bias.detach())]
        if len(others):  # no gradient at all, rather than one of 0, where only kept tokens are trained
            parts.append(scored(others, head.weight, head.bias))
        return torch.cat(parts)[torch.cat([kept, others]).argsort()]


@torch.no_grad()
def has_separate_head(model: Any) -> bool:
    """Return whether the logits are just a linear map of the decoder's last hidden state.

    Some models scale or cap them after that. Tried on a few tokens: if the results differ by a bit, every
    log-probability comes from the model's own forward pass, which takes more memory.
    """
    head = model.get_output_embeddings()
    text_config = model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear) or getattr(text_config, "final_logit_softcapping", None):
        return False
    token_ids_BT = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    try:
        states = model.get_decoder()(input_ids=token_ids_BT, use_cache=False).last_hidden_state
        logits = model(input_ids=token_ids_BT, use_cache=False).logits
        return torch.equal(functional.linear(states, head.weight, head.bias), logits)
    except (AttributeError, TypeError, RuntimeError):
        return False
