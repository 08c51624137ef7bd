"""Keep a conversation together with its token ids: append to them turn by turn, and rewrite them if the template would.

Training and serving share this, so that a served prompt is, token for token, the one that training renders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from backtalk.language.renderer import Renderer
from backtalk.messages import Message
from backtalk.trajectory import Segment


@dataclass(slots=True)
class History:
    """A conversation, in which actions are token ids, and the token ids it is rendered to.

    ``token_ids`` are those of the current branch: the policy's prompt. A rewritten history is a new branch.
    """

    conversation: list[Message | Sequence[int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    branch: int = 0
    turns: int = 0

    def copy(self) -> History:
        """Return a copy that grows on its own."""
        return History([*self.conversation], [*self.token_ids], self.branch, self.turns)

    def begin(self, messages: Sequence[Message], renderer: Renderer) -> tuple[Segment, ...]:
        """Append the prompt, with the generation prompt at its end; return its segments."""
        return self._append(messages, renderer.render_prompt(messages))

    def act(self, token_ids: Sequence[int]) -> None:
        """Append the token ids of an action, unchanged."""
        self.conversation.append(tuple(token_ids))
        self.token_ids += token_ids
        self.turns += 1

    def observe(self, messages: Sequence[Message], renderer: Renderer) -> tuple[Segment, ...]:
        """Append the observation of the last action; return its segments, or those of a whole new branch.

        Raises:
            RenderError: the chat template rewrites earlier turns, and ``on_drift`` is "stop".
        """
        turn = self.turns - 1
        if len(self.conversation) > 1 and renderer.can_append(self.conversation, messages):
            closed = self.token_ids[-1:] == [renderer.end_of_turn_id]
            segments = renderer.render_observation(messages, turn=turn, closed=closed)
            return self._append(messages, tuple(replace(segment, branch=self.branch) for segment in segments))
        segments = renderer.render_history(self.conversation, messages, turn=turn, branch=self.branch + 1)
        self.branch, self.token_ids = self.branch + 1, []
        return self._append(messages, segments)

    def _append(self, messages: Sequence[Message], segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        self.conversation += messages
        self.token_ids += [token for segment in segments for token in segment.token_ids]
        return segments
