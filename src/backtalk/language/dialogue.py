"""A conversation as one chat template takes it: which roles there are, and which messages have to become one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from backtalk.errors import RenderError
from backtalk.language.encoder import Piece
from backtalk.language.template import ChatTemplate, Roles
from backtalk.trajectory import TokenRole

_JOINT = "\n\n"  # between two messages that had to be put into one


class Turn(NamedTuple):
    """One message as the chat template sees it, made of one or more of ours."""

    role: str
    pieces: tuple[Piece, ...]
    tool: str | None = None


class Dialogue:
    """A template and what it takes.

    Observations are ``tool`` messages, or a user's where the template has no tool messages or cannot keep them. A
    system message that is refused, or does not stay where it is (Mistral's moves to the last user message), begins
    the first user message. Where two user messages may not follow each other, they become one.
    """

    def __init__(self, template: ChatTemplate, tool_role: str, extends: bool) -> None:
        self.template, self.tool_role, self.extends = template, tool_role, extends
        self._takes_runs = template.takes(("user", "user"))
        self._takes_system = self._keeps_system()

    def turns(self, said: Iterable[Turn]) -> list[Turn]:
        chat: list[Turn] = []
        for turn in said:
            role = self._role(turn.role)
            if chat and self._joins(chat[-1].role, role):
                joint = Piece(_JOINT, TokenRole.TEMPLATE, turn.tool)
                chat[-1] = chat[-1]._replace(pieces=(*chat[-1].pieces, joint, *turn.pieces))
            else:
                chat.append(turn._replace(role=role))
        return chat

    def roles(self, roles: Iterable[str]) -> Roles:
        """The roles of what ``turns`` gives."""
        chat: list[str] = []
        for role in map(self._role, roles):
            if not (chat and self._joins(chat[-1], role)):
                chat.append(role)
        return tuple(chat)

    def _role(self, role: str) -> str:
        if role == "tool":
            return self.tool_role
        return "user" if role == "system" and not self._takes_system else role

    def _joins(self, before: str, role: str) -> bool:
        return before == role == "user" and not self._takes_runs

    def _keeps_system(self) -> bool:
        try:
            return self.template.extends(("system", "user"), (self.tool_role,)) or not self.extends
        except RenderError:
            return False


def open_dialogue(templates: Sequence[ChatTemplate], on_drift: Literal["stop", "fork"]) -> Dialogue:
    """The first template that can be extended turn by turn, with messages of tools, else with a user's.

    Raises:
        RenderError: none takes a conversation; or all rewrite earlier turns, and ``on_drift`` is "stop".
    """
    fallback, problem = None, None
    for template in templates:
        for role in ("tool", "user"):
            try:
                if template.always_extends((role,)):
                    return Dialogue(template, role, True)
                fallback = fallback or (template, role)
            except RenderError as error:
                problem = problem or error
    if fallback is None:
        raise problem or RenderError("there is no chat template")
    if on_drift == "stop":
        raise RenderError(
            "the chat template rewrites earlier turns when observations follow, so a sampled history cannot be "
            "extended; set on_drift=fork to train each rewritten history as a sequence of its own, or use a "
            "template that only appends"
        )
    return Dialogue(*fallback, False)
