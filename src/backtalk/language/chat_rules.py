"""Choose how a conversation is given to a chat template: with tools or without, in which roles, and what is merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from backtalk.errors import RenderError
from backtalk.language.encoder import Piece
from backtalk.language.template import ChatTemplate, Roles
from backtalk.language.tool_formats import Syntax
from backtalk.language.tool_formats.schemas import tool_schemas
from backtalk.messages import ToolSpec
from backtalk.trajectory import TokenRole

_SEPARATOR = "\n\n"  # between the texts of merged messages


class ChatMessage(NamedTuple):
    """A message as the chat template gets it."""

    role: str
    pieces: tuple[Piece, ...]
    tool: str | None = None


class ChatRules:
    """A chat template and what it accepts.

    Observations are ``tool`` messages, or ``user`` messages if the template has no tool messages or does not keep them
    unchanged. A system message that the template refuses or moves (Mistral's goes to the last user message) is put
    before the text of the first user message. Consecutive user messages are merged if the template refuses them.
    """

    explains_tools: bool = True  # whether the prompt says how to write calls, or the policy was trained to

    def __init__(self, template: ChatTemplate, tool_role: str, append_only: bool) -> None:
        self.template, self.tool_role, self.append_only = template, tool_role, append_only
        self._accepts_user_runs = template.accepts(("user", "user"))
        self._accepts_system = self._keeps_system()

    def merge(self, messages: Iterable[ChatMessage]) -> list[ChatMessage]:
        """Return the messages with the roles that the template accepts, merged where it requires that."""
        merged: list[ChatMessage] = []
        for message in messages:
            moves = message.role == "system" and not self._accepts_system
            role = self.tool_role if message.role == "tool" else "user" if moves else message.role
            if merged and merged[-1].role == role == "user" and not self._accepts_user_runs:
                separator = Piece(_SEPARATOR, TokenRole.TEMPLATE, message.tool)
                merged[-1] = merged[-1]._replace(pieces=(*merged[-1].pieces, separator, *message.pieces))
            else:
                merged.append(message._replace(role=role))
        return merged

    def merge_roles(self, roles: Iterable[str]) -> Roles:
        """Return the roles of what :meth:`merge` returns for messages of these roles."""
        return tuple(message.role for message in self.merge(ChatMessage(role, ()) for role in roles))

    def _keeps_system(self) -> bool:
        try:
            return self.template.keeps_history(("system", "user"), (self.tool_role,)) or not self.append_only
        except RenderError:
            return False


def choose_rules(
    tokenizer: Any,
    source: str,
    syntax: Syntax,
    tools: Sequence[ToolSpec],
    options: Mapping[str, Any],
    on_drift: Literal["stop", "fork"],
) -> ChatRules:
    """Choose the tools and the role of observations with which a template keeps the history; tools are tried first.

    The template gets the tools only if it then explains them in the policy's format.

    Raises:
        RenderError: it renders no conversation; or it rewrites earlier turns, and ``on_drift`` is "stop".
    """
    without_tools = ChatTemplate(tokenizer, source, [], options)
    templates = [without_tools]
    if tools and syntax.in_chat_templates:
        with_tools = ChatTemplate(tokenizer, source, tool_schemas(tools), options)
        prompt = "".join(with_tools.scaffold(("user",)).literals) if with_tools.accepts(("user",)) else ""
        if all(tool.name in prompt for tool in tools) and syntax.is_explained_in(prompt):
            templates.insert(0, with_tools)
    rules = _choose_roles(templates, on_drift)
    rules.explains_tools = rules.template is not without_tools or syntax.is_explained_in("")
    return rules


def _choose_roles(templates: Sequence[ChatTemplate], on_drift: Literal["stop", "fork"]) -> ChatRules:
    """Choose the first template that keeps the history, with ``tool`` messages if it can, else ``user`` messages."""
    fallback, problem = None, None
    for template in templates:
        for role in ("tool", "user"):
            try:
                # The first two turns: what can be known before there is a conversation.
                if all(template.keeps_history(roles, (role,)) for roles in (("user",), ("user", "assistant", role))):
                    return ChatRules(template, role, True)
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
    return ChatRules(*fallback, False)
