"""Encode pieces of text whose writers are known, so that the role of each token is known too.

Only a chat template's own text is searched for control tokens. All other text is encoded by a copy of the tokenizer
that has none, so that no observation can inject one. Each token gets the role of the piece whose characters it covers,
by the tokenizer's offsets.
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

# A token that covers characters of several pieces takes the first of these roles that is among theirs: so no ENV_OUTPUT
# token holds text of the harness, and no token of a message holds text of the template.
EDGE_ORDER = (TokenRole.TEMPLATE, TokenRole.CONTEXT, TokenRole.WARNING, TokenRole.ENV_OUTPUT)


class Piece(NamedTuple):
    """Plain text, or token ids to be kept unchanged, with their token role and the tool whose observation it is."""

    content: str | tuple[int, ...]
    role: TokenRole
    tool: str | None = None


class Encoder:
    """A fast tokenizer, split into its control tokens and a tokenizer of plain text.

    Control tokens are all added tokens but runs of white space, whether flagged as special or not: marks of templates
    such as ``</tool_response>`` often are not, and observations must not be able to write them either.

    Raises:
        RenderError: the tokenizer is not a fast one, or its copy still makes control tokens of plain text.
    """

    control_ids: dict[str, int]  # by the text of the token

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
        self._strips: dict[str, tuple[bool, bool]] = {}  # white space on the left, on the right
        for token in state["added_tokens"]:
            token["special"] = bool(token["content"].replace("\u2581", " ").strip())  # Metaspace's space
            if token["special"]:
                self.control_ids[token["content"]] = token["id"]
                self._strips[token["content"]] = (token["lstrip"], token["rstrip"])
        self.control_id_set = frozenset(self.control_ids.values())
        self._control_pattern = _any_of(self.control_ids)
        state.update(post_processor=None, truncation=None, padding=None)  # no begin token, nothing cut, whole offsets
        self._at_start = self._plain_tokenizer(state)
        inside = _without_first_space(state.get("pre_tokenizer"))
        self._inside = self._plain_tokenizer({**state, "pre_tokenizer": inside}) if inside else self._at_start

    def _plain_tokenizer(self, state: dict[str, Any]) -> Any:
        """Return a tokenizer of this state that has no control tokens."""
        plain = type(self.backend).from_str(json.dumps(state))
        plain.encode_special_tokens = True
        texts = list(self.control_ids)
        for text, encoding in zip(texts, plain.encode_batch(texts, add_special_tokens=False), strict=True):
            if self.control_ids[text] in encoding.ids:
                raise RenderError(f"this tokenizer makes control tokens of plain text such as {text!r}; do not use it")
        return plain

    def split_controls(self, text: str, marks: Iterable[str] | None = None) -> tuple[str | int, ...]:
        """Split text into plain text and the ids of control tokens; of those in ``marks`` only, if given.

        White space beside a control token that strips it (``lstrip``, ``rstrip``) is dropped, as by the tokenizer.
        """
        wanted = None if marks is None else frozenset(marks)
        items: list[str | int] = []
        position, strip_left = 0, False
        for match in self._control_pattern.finditer(text):
            if wanted is not None and match[0] not in wanted:
                continue
            strip_right, strips_next = self._strips[match[0]]
            between = text[position : match.start()]
            between = between.lstrip() if strip_left else between
            items += [between.rstrip() if strip_right else between, self.control_ids[match[0]]]
            position, strip_left = match.end(), strips_next
        rest = text[position:]
        items.append(rest.lstrip() if strip_left else rest)
        return tuple(item for item in items if item != "")

    def encode(self, pieces: Iterable[Piece], *, at_start: bool = False) -> list[tuple[int, Piece]]:
        """Return token ids, each with its piece. Consecutive texts are encoded as one, so that tokens merge over edges.

        ``at_start`` says that the pieces begin the sequence: some tokenizers put a space before its first word.
        """
        tokens: list[tuple[int, Piece]] = []
        for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece.content, str)):
            if is_text:
                tokens += self._encode_text(list(run), self._at_start if at_start and not tokens else self._inside)
            else:
                tokens += [(token, piece) for piece in run for token in piece.content if isinstance(token, int)]
        return tokens

    def _encode_text(self, run: Sequence[Piece], plain: Any) -> Iterable[tuple[int, Piece]]:
        """Encode consecutive texts with tokenizer ``plain``; give each token to a piece by the characters it covers."""
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
        """Return the text of token ids, control tokens included."""
        return self.backend.decode(list(token_ids), skip_special_tokens=False)


_encoders: WeakKeyDictionary[Any, tuple[int, Encoder]] = WeakKeyDictionary()


def get_encoder(tokenizer: Any) -> Encoder:
    """Return the encoder of a tokenizer, made once, as copying a vocabulary takes a second or more."""
    count = len(getattr(tokenizer, "added_tokens_decoder", ()))
    known = _encoders.get(tokenizer)
    if known is None or known[0] != count:
        known = _encoders[tokenizer] = (count, Encoder(tokenizer))
    return known[1]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the longest of these texts; grouped by first letter, as some tokenizers have thousands."""
    texts = sorted(texts, key=lambda text: (text[0], -len(text)))
    heads = groupby(texts, key=lambda text: text[0])
    return re.compile(
        "|".join(f"{re.escape(head)}(?:{'|'.join(re.escape(text[1:]) for text in run)})" for head, run in heads)
        or r"(?!)"  # matches nothing
    )


def _without_first_space(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the pre-tokenizer for text that follows a control token; None if it is the same as at the start."""
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
