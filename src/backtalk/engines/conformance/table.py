"""The table model: log p(token | token before) from a table, as numbers and as a model folder of transformers.

    logits of a token given the one before = weight of the head[token, before]

It is a decoder without layers: the embedding and the norm make exactly the one-hot vector of the last token, so the
head is the table. Its gradient holds, in the column of the token before,

    d(loss)/d(logit) = d(loss)/d(logprob) * (1 - p) at the token itself,

from which ``token_gradients`` gets the gradient of each token, for any trainer that trains the head of such a folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from backtalk.objective.samples import Sample

VOCABULARY = 256  # also the hidden size; the square of a power of two, so that the norm's result is exact
FIRST_TOKEN = 2  # 0 is padding and end, 1 unknown


def logit(before: int, token: int) -> float:
    """Return an entry of the table: a float32 number."""
    return 5.0 if token == before + 1 else ((7 * before + 13 * token) % 17 - 8) / 16


@cache
def _log_total(before: int) -> float:
    return math.log(math.fsum(math.exp(logit(before, token)) for token in range(VOCABULARY)))


def logprob(before: int, token: int) -> float:
    """Return log p(token | token before), in nats."""
    return logit(before, token) - _log_total(before)


def token_gradients(head_gradient_VD: Tensor, samples: Sequence[Sample]) -> list[list[float]]:
    """Return d(loss)/d(logprob) of each token of each sample, from the gradient of the head's weight; 0 for the first.

    Holds where no token occurs twice among the samples, and every loss is a function of log-probabilities.
    """
    gradient_VD = head_gradient_VD.detach().double().cpu()
    rows: list[list[float]] = []
    for sample in samples:
        ids = sample.token_ids.tolist()
        inner = [
            float(gradient_VD[token, before]) / -math.expm1(logprob(before, token)) for before, token in pairwise(ids)
        ]
        rows.append([0.0, *inner] if ids else [])
    return rows


def write_table_model(folder: Path) -> Path:
    """Write the table as a model of transformers with a tokenizer of one word a token, and return its folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from backtalk.engines.torch.model import quiet_transformers

    words = {"<end>": 0, "<unknown>": 1} | {f"w{i}": i for i in range(FIRST_TOKEN, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=VOCABULARY,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        rms_norm_eps=1e-30,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config)
    root = math.isqrt(VOCABULARY)
    table = [[logit(before, token) for before in range(VOCABULARY)] for token in range(VOCABULARY)]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(root * torch.eye(VOCABULARY))
        model.model.norm.weight.fill_(1 / root)
        model.lm_head.weight.copy_(torch.tensor(table))
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
