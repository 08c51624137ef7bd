"""Between text and token ids: which tokens a text becomes, and whose each of them is.

Control tokens come from the chat template alone. What people, the harness or the world wrote is encoded by a copy of
the tokenizer that knows no control tokens, so no text can become one; and every token is traced back to the
characters it covers, so that nobody has to guess afterwards who wrote it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from backtalk.errors import RenderError
from backtalk.messages import clean_text
from backtalk.trajectory import TokenRole

# A token that reaches over an edge takes the earlier of these roles: template is no one's text, and a token that
# holds a piece of the harness's text is not what the world said.
EDGE_ORDER = (TokenRole.TEMPLATE, TokenRole.CONTEXT, TokenRole.WARNING, TokenRole.ENV_OUTPUT)


class Piece(NamedTuple):
    """Plain text, or tokens to be kept as they are; who wrote it; and the tool that it answers."""

    content: str | tuple[int, ...]
    role: TokenRole
    tool: str | None = None


class Encoder:
    """A fast tokenizer, taken apart into control tokens and plain text.

    Control is every added token but runs of white space: a template's marks such as ``</tool_response>`` are often
    not flagged as special, and must not be open to the world for that.

    Raises:
        RenderError: the tokenizer is not a fast one, or makes control tokens of plain text.
    """

    control_ids: dict[str, int]  # by their text

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not all(callable(getattr(backend, name, None)) for name in ("encode", "decode", "to_str")):
            raise RenderError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so nobody knows which characters a token "
                "covers; load it with AutoTokenizer from a folder that has a tokenizer.json"
            )
        self.backend: Any = backend
        state = json.loads(self.backend.to_str())
        self.control_ids = {}
        self._takes_space: dict[str, tuple[bool, bool]] = {}  # before it, after it
        for token in state["added_tokens"]:
            token["special"] = bool(token["content"].replace("\u2581", " ").strip())  # a way to write a space
            if token["special"]:
                self.control_ids[token["content"]] = token["id"]
                self._takes_space[token["content"]] = (token["lstrip"], token["rstrip"])
        self.control_id_set = frozenset(self.control_ids.values())
        self._pattern = _any_of(self.control_ids)
        state.update(post_processor=None, truncation=None, padding=None)  # no begin token, nothing cut, whole offsets
        self._first = self._plain_copy(state)
        later = _without_first_space(state.get("pre_tokenizer"))
        self._later = self._plain_copy({**state, "pre_tokenizer": later}) if later else self._first

    def _plain_copy(self, state: dict[str, Any]) -> Any:
        plain = type(self.backend).from_str(json.dumps(state))
        plain.encode_special_tokens = True
        texts = list(self.control_ids)
        for text, encoding in zip(texts, plain.encode_batch(texts, add_special_tokens=False), strict=True):
            if self.control_ids[text] in encoding.ids:
                raise RenderError(f"this tokenizer makes control tokens of plain text such as {text!r}; do not use it")
        return plain

    def scan(self, text: str, marks: Iterable[str] | None = None) -> tuple[str | int, ...]:
        """Text of the template's cut at its control tokens (those of ``marks`` only, where given).

        White space beside a token that swallows it (``lstrip``, ``rstrip``) is dropped, as the tokenizer itself does.
        """
        wanted = None if marks is None else frozenset(marks)
        items: list[str | int] = []
        position, swallow = 0, False
        for match in self._pattern.finditer(text):
            if wanted is not None and match[0] not in wanted:
                continue
            before, after = self._takes_space[match[0]]
            between = text[position : match.start()]
            between = between.lstrip() if swallow else between
            items += [between.rstrip() if before else between, self.control_ids[match[0]]]
            position, swallow = match.end(), after
        rest = text[position:]
        items.append(rest.lstrip() if swallow else rest)
        return tuple(item for item in items if item != "")

    def encode(self, pieces: Iterable[Piece], *, at_start: bool = False) -> list[tuple[int, Piece]]:
        """Tokens, each with the piece it belongs to. Text between two kept tokens is encoded as one.

        ``at_start`` says that nothing stands before it: some tokenizers put a space before the first word of all.
        """
        tokens: list[tuple[int, Piece]] = []
        for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece.content, str)):
            if is_text:
                tokens += self._encode_text(list(run), self._first if at_start and not tokens else self._later)
            else:
                tokens += [(token, piece) for piece in run for token in piece.content if isinstance(token, int)]
        return tokens

    def _encode_text(self, run: Sequence[Piece], plain: Any) -> Iterable[tuple[int, Piece]]:
        cleaned = ((clean_text(str(piece.content)), piece) for piece in run)
        texts = [(text, piece) for text, piece in cleaned if text]
        if not texts:
            return []
        encoding = plain.encode("".join(text for text, _ in texts), add_special_tokens=False)
        ids, pieces = encoding.ids, [piece for _, piece in texts]
        if not self.control_id_set.isdisjoint(ids):
            raise RenderError("plain text became a control token; this tokenizer cannot tell the two apart")
        if len(pieces) == 1:
            return [(token, pieces[0]) for token in ids]
        ends = list(accumulate(len(text) for text, _ in texts))
        owners: list[Piece] = []
        for start, end in encoding.offsets:  # in characters of the joined text
            first = min(bisect_right(ends, start), len(pieces) - 1)
            last = max(first, bisect_left(ends, end))
            owners.append(
                pieces[first]
                if first == last
                else min(pieces[first : last + 1], key=lambda piece: EDGE_ORDER.index(piece.role))
            )
        return zip(ids, owners, strict=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(list(token_ids), skip_special_tokens=False)


_encoders: WeakKeyDictionary[Any, tuple[int, Encoder]] = WeakKeyDictionary()


def encoder_of(tokenizer: Any) -> Encoder:
    """The same encoder for the same tokenizer, as copying a vocabulary takes a second or more."""
    count = len(getattr(tokenizer, "added_tokens_decoder", ()))
    known = _encoders.get(tokenizer)
    if known is None or known[0] != count:
        known = _encoders[tokenizer] = (count, Encoder(tokenizer))
    return known[1]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """The longest of these at a place; sorted by first letter, as some tokenizers have thousands of them."""
    texts = sorted(texts, key=lambda text: (text[0], -len(text)))
    heads = groupby(texts, key=lambda text: text[0])
    return re.compile(
        "|".join(f"{re.escape(head)}(?:{'|'.join(re.escape(text[1:]) for text in run)})" for head, run in heads)
        or r"(?!)"
    )  # which matches nothing


def _without_first_space(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """The pre-tokenizer for text that follows a control token; None where it is the same as at the start."""
    if pre_tokenizer is None:
        return None
    if pre_tokenizer["type"] == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        return {**pre_tokenizer, "prepend_scheme": "never"}
    if pre_tokenizer["type"] == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
        changed = [_without_first_space(part) for part in parts]
        if any(changed):
            return {**pre_tokenizer, "pretokenizers": [new or old for new, old in zip(changed, parts, strict=True)]}
    return None
