"""Find where the calls of an action end, so that sampling can stop there. docs/renderer.md states the rule."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from backtalk.language.tool_formats.base import Reply, Syntax


class CallsEnd(NamedTuple):
    """The end of an action's calls: the tokens up to and with the one in which it lies, and whether all is over.

    It is over if the policy went on with something that belongs to no call. More tokens then change nothing.
    """

    num_tokens: int
    is_over: bool


class ActionEnd:
    """Finds the end of an action's calls in its token ids.

    ``max_calls`` is the number of the last call that counts, None if all do. ``read`` returns ids as a reply, without
    a stop token at their end; its second argument says whether the reply is whole.
    """

    def __init__(self, syntax: Syntax, max_calls: int | None, read: Callable[[Sequence[int], bool], Reply]) -> None:
        self._syntax, self._max_calls, self._read = syntax, max_calls, read
        last_letters = frozenset(mark[-1] for mark in syntax.closings)
        self._may_close = cache(lambda token_id: not last_letters.isdisjoint(read([token_id], False).text))

    def find(self, token_ids: Sequence[int]) -> CallsEnd | None:
        """Return where the calls of an action end; None if there is none."""
        reply = self._read(token_ids, False)
        found = find_calls_end(self._syntax, reply, self._max_calls)
        if found is None:
            return None
        whole = reply.text[: found[0]]  # ends with a mark, so that a prefix of the ids decodes to a prefix of the text
        prefixes = range(len(token_ids))
        count = bisect_left(prefixes, True, key=lambda n: self._read(token_ids[:n], False).text.startswith(whole))
        return CallsEnd(count, found[1])

    def count_kept(self, token_ids: Sequence[int]) -> int:
        """Return the number of tokens that belong to the action: all, or those up to the end of its calls."""
        end = self.find(token_ids)
        return end.num_tokens if end is not None and end.is_over else len(token_ids)

    def watch(self) -> Callable[[int], bool]:
        """Return a function that is given an action's tokens as they are sampled, and says when it is over."""
        token_ids: list[int] = []
        has_call = False

        def is_over(token_id: int) -> bool:
            nonlocal has_call
            token_ids.append(token_id)
            if not has_call and not self._may_close(token_id):
                return False  # no call ends here, and reading all of the action for every token would be slow
            end = self.find(token_ids)
            has_call = end is not None
            return end is not None and end.is_over

        return is_over


def find_calls_end(syntax: Syntax, reply: Reply, max_calls: int | None) -> tuple[int, bool] | None:
    """Return the position at which the calls of a reply end, and whether something else follows; None without a call.

    They end with call number ``max_calls`` (None: any number), with a closed one that cannot be read, or where what
    follows cannot be the beginning of another call. White space, and a closing mark that a complete call lacks so far,
    are nothing else. Once something else follows, the answer is the same for every longer reply.
    """
    reading = syntax.read(reply)
    spans = reading.spans[:max_calls]
    is_last = len(spans) == max_calls
    if not is_last and reading.broken is not None:
        start, at = reading.broken
        closing = _find_closing(syntax, reply, at)
        spans, is_last = (spans, False) if closing is None else ([*spans, (start, closing)], True)
    if not spans:
        return None
    for (_, end), (start, _) in pairwise(spans):
        if reply.text[end:start].strip() and not syntax.has_prose:
            return end, True
    end = spans[-1][1]
    rest = reply.text[end:].strip()
    belongs = any(mark.startswith(rest) for mark in syntax.closings)
    if not is_last:
        belongs |= syntax.has_prose or any(rest.startswith(m) or m.startswith(rest) for m in syntax.openings)
    return end, not belongs


def _find_closing(syntax: Syntax, reply: Reply, start: int) -> int | None:
    """Return the position after the first closing mark from ``start`` on."""
    for match in re.compile("|".join(map(re.escape, syntax.closings))).finditer(reply.text, start):
        if reply.marks is None or match.start() in reply.marks:
            return match.end()
    return None
