"""Who wrote each token of a completion, for rollouts that TRL itself ran with tools or an environment.

TRL marks what the model did not write (``tool_mask``): the tool's text and the template around it. Here the text is
found in the template: it is rendered once more with marks in place of the bodies, and each token belongs to the piece
whose characters it covers. A token across an edge is TEMPLATE.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

from backtalk.trajectory import Segment, TokenRole, Trajectory

log = logging.getLogger(__name__)

Message = Mapping[str, Any]
_MARK = "\ue000{}\ue001"  # private characters, which no template writes


class ToolRoles:
    """The roles of tokens in the completions of one trainer's tool loop; counts the tokens that it cannot place."""

    def __init__(self, tokenizer: Any, chat_template: str | None, options: Mapping[str, Any]) -> None:
        self._tokenizer, self._options = tokenizer, {**options, "chat_template": chat_template}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(post_processor=None, truncation=None, padding=None)  # whole offsets, nothing cut
        self._backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
        self.unplaced = 0

    def trajectory(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        tool_mask: Sequence[int],
        messages: Sequence[Message],
    ) -> Trajectory:
        """Return a completion with its roles: model tokens are actions, and each tool's text is an observation."""
        segments = [Segment(TokenRole.CONTEXT, tuple(prompt_ids))]
        answers = (
            list(run) for role, run in groupby(messages, key=lambda message: message.get("role")) if role == "tool"
        )
        turn = -1
        for written, run in groupby(zip(completion_ids, tool_mask, strict=True), key=lambda pair: bool(pair[1])):
            ids = tuple(token for token, _ in run)
            if written or turn < 0:
                turn += 1
                segments.append(Segment(TokenRole.ACTION, ids, (0.0,) * len(ids), turn))
            else:
                segments += self._observation(ids, next(answers, ()), turn)
        return Trajectory(task_id="", sample_index=0, segments=tuple(segments))

    def _observation(self, ids: tuple[int, ...], answers: Sequence[Message], turn: int) -> Iterator[Segment]:
        """Yield the segments that follow a call, in order: template, and the bodies of the answers."""
        owners = self._owners(ids, answers)
        if owners is None:
            self.unplaced += len(ids)
            log.warning(
                "the answers of tools cannot be found in %d tokens of a completion, so nothing of them is learned; the "
                "chat template changes what a tool returns",
                len(ids),
            )
            owners = [None] * len(ids)
        for owner, run in groupby(zip(ids, owners, strict=True), key=lambda pair: pair[1]):
            tokens = tuple(token for token, _ in run)
            if owner is None:
                yield Segment(TokenRole.TEMPLATE, tokens, turn=turn)
            else:
                answer = answers[owner]
                yield Segment(_role(answer), tokens, turn=turn, tool=answer.get("name"))

    def _owners(self, ids: tuple[int, ...], answers: Sequence[Message]) -> list[int | None] | None:
        """Return the index of the answer that each token is of, None for the template; None where they do not fit."""
        if not answers or not all(isinstance(answer.get("content"), str) for answer in answers):
            return None
        marks = [_MARK.format(i) for i in range(len(answers))]
        frame = self._render([{**answer, "content": mark} for answer, mark in zip(answers, marks, strict=True)])
        pieces: list[tuple[str, int | None]] = []
        for i, (mark, answer) in enumerate(zip(marks, answers, strict=True)):
            before, found, frame = frame.partition(mark)
            if not found:
                return None
            pieces += [(before, None), (answer["content"], i)]
        pieces.append((frame, None))
        text = self._render(answers)
        if "".join(piece for piece, _ in pieces) != text:
            return None
        encoding = self._backend.encode(text, add_special_tokens=False)
        if tuple(encoding.ids[-len(ids) :]) != ids:
            return None
        ends = list(accumulate(len(piece) for piece, _ in pieces))
        spans = [(end - len(piece), end, owner) for end, (piece, owner) in zip(ends, pieces, strict=True)]
        return [
            next(
                (owner for a, b, owner in spans if owner is not None and a <= start and end <= b and end > start), None
            )
            for start, end in encoding.offsets[-len(ids) :]
        ]

    def _render(self, answers: Sequence[Message]) -> str:
        """Render the answers after a call, as TRL's tool loop does."""
        call = {"type": "function", "function": {"name": answers[0].get("name", ""), "arguments": {}}}
        before = [
            {"role": "user", "content": "dummy"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        return self._tokenizer.apply_chat_template(
            before + [dict(answer) for answer in answers], add_generation_prompt=True, tokenize=False, **self._options
        )


def _role(answer: Message) -> TokenRole:
    """Return WARNING for what TRL itself answers to a call of no tool, else ENV_OUTPUT."""
    content = str(answer.get("content"))
    no_tool = content == str({"error": f"Tool {answer.get('name')} not found."})
    unsupported = content.startswith("{'error': 'Unsupported tool call type: ")
    return TokenRole.WARNING if no_tool or unsupported else TokenRole.ENV_OUTPUT


def rollout_trajectory(prompt_ids: Sequence[int], completion_ids: Sequence[int], roles: Sequence[int]) -> Trajectory:
    """Return a completion of a rollout function with the roles that it gave, one ``TokenRole`` a token.

    Raises:
        ValueError: another number of roles than tokens, or one that is no role.
    """
    if len(roles) != len(completion_ids):
        raise ValueError(
            f"rollout_func gave {len(roles)} token_roles for {len(completion_ids)} completion tokens; give one a token"
        )
    segments = [Segment(TokenRole.CONTEXT, tuple(prompt_ids))]
    turn: int | None = None
    for role, run in groupby(zip(completion_ids, roles, strict=True), key=lambda pair: TokenRole(pair[1])):
        ids = tuple(token for token, _ in run)
        if role is TokenRole.ACTION:
            turn = 0 if turn is None else turn + 1
        own = None if role is TokenRole.CONTEXT else turn
        segments.append(Segment(role, ids, (0.0,) * len(ids) if role is TokenRole.ACTION else None, own))
    return Trajectory(task_id="", sample_index=0, segments=tuple(segments))
