"""A tiny random Qwen3 with its own byte-level BPE, built in a second, for tests that need real parts.

The weights are drawn from a fixed seed, so two folders made by one process hold the same model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bash>", "</bash>", "<submit>", "</submit>")

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SHELL_TEXT = (
    "ls -la /srv/logs",
    "total 12\ndrwxr-xr-x 2 agent agent 4096 Jan  1 00:00 .\n-rw-r--r-- 1 agent agent  220 Jan  1 00:00 notes.txt",
    "cat notes.txt | grep -n error | sort | uniq -c | head -n 5",
    "grep: /var/log/app.log: No such file or directory",
    "find . -name '*.txt' -exec wc -l {} +",
    "You are working in a Linux terminal. Run one command at a time and submit the answer.",
    "How many lines of access.log hold a status of 500? Submit the number.",
    "awk '{print $1}' access.log | sort -u | wc -l",
    "[exit code 1]\n[no output]\n[timed out after 30 s; the command was stopped]",
    "bash: line 1: foo: command not found",
    "echo hello world > /tmp/out.txt && cat /tmp/out.txt",
)


def tiny_tokenizer(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a little shell text; ChatML template; tool tags are special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SHELL_TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|endoftext|>", "<|im_end|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model_dir(path: Path, *, seed: int = 0, hidden_size: int = 64, tie_word_embeddings: bool = True) -> Path:
    """Write the tiny model and its tokenizer to ``path`` (made if absent) and return it."""
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
