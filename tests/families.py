"""Tokenizers and chat templates of many families, for tests.

Always there: the templates that the trl package carries, over small tokenizers trained here with the control tokens of
that family; and templates of our own for what trl has none of. Real tokenizers, where BACKTALK_TOKENIZERS names a
folder with one subfolder each (``scripts/tokenizers FOLDER`` fills it).
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tiny import CHAT_TEMPLATE, SHELL_TEXT

_TRL = importlib.util.find_spec("trl")
TEMPLATES = Path(_TRL.submodule_search_locations[0]) / "chat_templates" if _TRL else None  # type: ignore[index]
REAL_FOLDER = os.environ.get("BACKTALK_TOKENIZERS", "")
REAL = ("qwen2_5", "qwen3", "llama3_2", "gemma3", "mistral_nemo", "llama2")  # the last has no template

# Of the kind that Mistral's are: strict alternation, tools and system message in the last user message, tool messages
# only with ids of nine letters.
ALTERNATING = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{- bos_token }}
{%- for m in rest %}
{%- if m.role == 'tool' and (m.tool_call_id is not defined or m.tool_call_id | length != 9) %}
{{- raise_exception('Tool call IDs should have 9 letters') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}
{%- if loop.last and tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' }}{% if loop.last and system is defined %}{{ system + '\\n\\n' }}{% endif %}{{ m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
QWEN = (*CHATML, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
DEEPSEEK = tuple(
    f"<\uff5c{name}\uff5c>"
    for name in (
        *("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant"),
        *("tool▁outputs▁begin", "tool▁output▁begin", "tool▁output▁end", "tool▁outputs▁end"),
    )
)


@dataclass(frozen=True)
class Family:
    """``template`` is a file of trl's, a template, or None; ``kind`` says how text becomes tokens."""

    template: str | None
    controls: tuple[str, ...]
    eos: str | None
    bos: str | None = None
    kind: str = "bytes"  # byte-level BPE; "gemma", "llama2", "metaspace": as SentencePiece, with bytes for the rest
    rstrip: tuple[str, ...] = ()  # control tokens that swallow the white space after them


FAMILIES = {
    "chatml": Family(CHAT_TEMPLATE, CHATML, "<|im_end|>"),
    "qwen2_5": Family("qwen2_5", QWEN, "<|im_end|>"),
    "qwen3": Family("qwen3", QWEN, "<|im_end|>"),
    "qwen3_training": Family("qwen3_training", QWEN, "<|im_end|>"),
    "qwen3_instruct_2507": Family("qwen3_instruct_2507", QWEN, "<|im_end|>"),
    "qwen3_5_think": Family("qwen3_5_think", QWEN, "<|im_end|>"),
    "llama3": Family("llama3", LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3_1": Family("llama3_1", LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3_2": Family("llama3_2", LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "gemma": Family("gemma", GEMMA, "<eos>", "<bos>", "gemma"),
    "gemma3": Family("gemma3", GEMMA, "<end_of_turn>", "<bos>", "gemma"),
    "mistral": Family(ALTERNATING, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "mistral_v1": Family(ALTERNATING, ("<s>", "</s>"), "</s>", "<s>", "llama2"),
    "phi3": Family("phi3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>"), "</s>", "<s>",
                   "metaspace", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi3_5": Family("phi3_5", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>"), "</s>"),
    "deepseekv3": Family("deepseekv3", DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0]),
    "glm4moe": Family("glm4moe", ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
                                  *QWEN[3:]), "<|user|>"),
    "lfm2": Family("lfm2", (*CHATML, "<|tool_response_start|>", "<|tool_response_end|>", "<|startoftext|>"),
                   "<|im_end|>", "<|startoftext|>"),
    "none_chatml": Family(None, CHATML, "<|endoftext|>"),
    "none_eos": Family(None, ("<s>", "</s>"), "</s>", "<s>", "llama2"),
}  # fmt: skip


def _real(name: str) -> Path:
    return Path(REAL_FOLDER) / name


def _param(name: str) -> object:
    if name.startswith("real/"):
        missing = not REAL_FOLDER or not (_real(name[5:]) / "tokenizer.json").exists()
        reason = "BACKTALK_TOKENIZERS names no folder with it; scripts/tokenizers FOLDER gets it"
    else:
        template = FAMILIES[name].template
        missing = TEMPLATES is None and template is not None and "{" not in template
        reason = "its chat template comes with the trl package"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


TINY_NAMES = [_param(name) for name in FAMILIES]
REAL_NAMES = [_param(f"real/{name}") for name in REAL]
ALL_NAMES = TINY_NAMES + REAL_NAMES


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    if not name.startswith("real/"):
        family = FAMILIES[name]
        return wrap(backend_of(family), family)
    return AutoTokenizer.from_pretrained(_real(name[5:]))


def trl_template(name: str) -> str:
    if TEMPLATES is None:
        pytest.skip("the chat template comes with the trl package")
    return (TEMPLATES / f"{name}.jinja").read_text()


def wrap(backend: Tokenizer, family: Family) -> PreTrainedTokenizerFast:
    template = family.template if family.template is None or "{" in family.template else trl_template(family.template)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=family.eos,
        bos_token=family.bos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def backend_of(family: Family, *, controls: bool = True) -> Tokenizer:
    """The family's tokenizer; without ``controls`` one that has never heard of them."""
    backend = Tokenizer.from_str(_trained(family.kind))
    if controls:
        backend.add_tokens([
            AddedToken(text, special="tool" not in text and "think" not in text, normalized=False,
                       rstrip=text in family.rstrip)
            for text in family.controls
        ])  # fmt: skip
    return backend


@cache
def _trained(kind: str) -> str:
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [],
        show_progress=False,
    )
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "bytes" else pre_tokenizers.Metaspace()
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([*SHELL_TEXT, "a)\n</b>\n\n(c)\n"] * 4, trainer)
    return backend.to_str() if kind == "bytes" else _with_bytes(backend, kind).to_str()


def _with_bytes(trained: Tokenizer, kind: str) -> Tokenizer:
    """As SentencePiece: what the vocabulary does not hold is written in bytes."""
    state = json.loads(trained.to_str())["model"]
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {text: number for number, text in enumerate([*first, *state["vocab"]])}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    match kind:
        case "gemma":
            backend.normalizer = replace
        case "llama2":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        case "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if kind != "gemma" else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
