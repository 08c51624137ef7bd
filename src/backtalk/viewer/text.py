"""Token ids back into text that is safe to show, and how each role looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.trajectory import TokenRole

MAX_TOKENS_A_CHARACTER = 4  # of UTF-8 bytes, each possibly its own token

# Role: (terminal style, HTML text colour, HTML background, what it is)
LOOKS = {
    TokenRole.CONTEXT: ("grey62", "#57606a", "#f6f8fa", "given text"),
    TokenRole.TEMPLATE: ("grey37", "#afb8c1", "#ffffff", "chat template"),
    TokenRole.ACTION: ("bold green", "#116329", "#dafbe1", "written by the agent"),
    TokenRole.ENV_OUTPUT: ("cyan", "#0a3069", "#ddf4ff", "said by the world"),
    TokenRole.WARNING: ("yellow", "#7d4e00", "#fff8c5", "said by the harness"),
}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that a run keeps in its folder (a ``tokenizers.Tokenizer``; transformers is not needed)."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path} is missing, so token ids cannot be shown as text; copy the model's tokenizer.json there"
        )
    return Tokenizer.from_file(str(path))


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, control characters made visible.

    A character spread over several tokens is shown at the first of them, and the others are empty.
    """
    texts: list[str] = []
    while len(texts) < len(token_ids):
        start = len(texts)
        for width in range(1, MAX_TOKENS_A_CHARACTER + 1):
            text = tokenizer.decode(list(token_ids[start : start + width]), skip_special_tokens=False)
            if "\ufffd" not in text:
                break
        else:
            width, text = 1, tokenizer.decode([token_ids[start]], skip_special_tokens=False)
        width = min(width, len(token_ids) - start)
        texts += [visible(text), *[""] * (width - 1)]
    return texts


def visible(text: str) -> str:
    """Control characters as their pictures, so that nothing a sandbox printed can steer a terminal."""
    return "".join(_picture(c) for c in text)


def _picture(c: str) -> str:
    code = ord(c)
    if c in "\n\t" or (code >= 0x20 and not 0x7F <= code <= 0x9F):
        return c
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
