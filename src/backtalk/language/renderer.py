"""Between chat messages and token ids: what a message becomes, who made each of its tokens, what an action means.

History is not rendered twice. What the chat template puts around messages is found by rendering bodies that are
placeholders; an observation is that scaffold with the real bodies in their places, and what the policy sampled stays
as it was. Every turn it is shown, on the shape of the conversation as it stands, that the template would have left
what is there alone; where it would not, that is raised, or the history is rewritten in a branch of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from backtalk.errors import ConfigError, RenderError
from backtalk.language.dialogue import Dialogue, Turn, open_dialogue
from backtalk.language.encoder import Piece, encoder_of
from backtalk.language.template import ChatTemplate, ChatTokenizer, Roles, Scaffold, escape, source_of
from backtalk.language.tokenizer import load_tokenizer
from backtalk.language.tool_formats import (
    CALL_CLOSE,
    CALL_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    Mark,
    Reply,
    ToolFormat,
    detect_format,
    how_many,
    open_syntax,
    parse_reply,
    refuse_control_tokens,
    tag_tokens,
    tool_schemas,
    write_message,
    write_reply,
)
from backtalk.messages import Message, ParsedAction, ToolCall, ToolSpec, clean_text
from backtalk.settings import check_choices
from backtalk.trajectory import Segment, TokenRole

Action = str | Sequence[int]  # an assistant's message: as decoded, or better the sampled ids themselves

_MARK = re.compile(r"</?[^\s<>]{1,40}>|\[/?[A-Z_]{2,40}\]")  # how templates spell the marks they set around bodies


@dataclass(frozen=True, kw_only=True, slots=True)
class RendererConfig:
    """How a conversation is written down."""

    tool_format: ToolFormat | None = None
    """How calls are written; null is what the model was made for, see detect_format."""
    thinking: Literal["off", "keep", "strip"] = "off"
    """off asks the template for none; keep leaves it in the history; strip takes it out after its turn, in a branch."""
    on_drift: Literal["stop", "fork"] = "stop"
    """Where the chat template rewrites earlier turns: raise, or begin a new branch."""
    max_calls_per_turn: int = 1
    """Tool calls that one action may hold."""
    which_calls: Literal["first", "last"] = "first"
    """Of a reply that holds more."""
    format_warnings: bool = False
    """Say in a WARNING what was odd about a call that could be read."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_calls_per_turn < 1:
            raise ConfigError(f"max_calls_per_turn={self.max_calls_per_turn} leaves no room for a call; use 1 or more")


class Renderer:
    """One tokenizer, chat template and set of tools.

    ``template_options`` go to the chat template, as ``{"date_string": "1 Jan 2025"}`` does.

    Raises:
        RenderError: the tokenizer is not a fast one, the template raises, drops or doubles messages, or it cannot be
            extended turn by turn and ``on_drift`` is "stop".
        ConfigError: the tools do not fit the format.
    """

    stop_token_ids: frozenset[int]  # any of them ends an action
    end_of_turn_id: int  # the one that the template ends an assistant's message with
    pad_token_id: int
    extends: bool  # whether every turn can be appended to what is there, as far as can be known at the start

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        tools: Sequence[ToolSpec],
        config: RendererConfig = RendererConfig(),
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.tools, self.config = tokenizer, tuple(tools), config
        self._for_tools = lru_cache(64)(lambda told: Renderer(tokenizer, told, config, template_options))
        self.encoder = encoder_of(tokenizer)
        self._scan = lru_cache(4096)(self.encoder.scan)
        refuse_control_tokens(self.tools, self.encoder.control_ids)
        source = source_of(tokenizer, self.encoder.control_ids)
        self.tool_format = config.tool_format or detect_format(source, self.encoder.control_ids, self.tools)
        self._syntax = open_syntax(self.tool_format, self.tools, self.encoder.control_ids)
        self._dialogue, self._preamble = self._open_dialogue(source, template_options or {})
        self._template = self._dialogue.template
        self.extends = self._dialogue.extends and config.thinking != "strip"
        self._thinking = self._template.scaffold(("user",)).literals[-1].rstrip().endswith(THINK_OPEN)  # before replies
        self.end_of_turn_id = self._find_end()
        eos, pad = (getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id"))
        self.stop_token_ids = frozenset({self.end_of_turn_id} | (self.encoder.control_id_set & {eos, pad}))
        self.pad_token_id = self.end_of_turn_id if pad is None else pad
        self._action_marks = frozenset(
            {CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE, "<|python_tag|>", *tag_tokens(self.tools)}
        )
        self._observation_marks = self._find_marks()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tools: Sequence[ToolSpec],
        config: RendererConfig = RendererConfig(),
        template_options: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """Load the tokenizer of a model folder or name; imports transformers."""
        return cls(load_tokenizer(path), tools, config, template_options)

    def for_tools(self, tools: Sequence[ToolSpec]) -> Renderer:
        """The same for other tools, such as those of the world that a rollout is in; made once for each set."""
        return self if tuple(tools) == self.tools else self._for_tools(tuple(tools))

    # --- messages to tokens ---

    def render_prompt(self, messages: Sequence[Message]) -> tuple[Segment, ...]:
        """System and task as CONTEXT in their TEMPLATE, up to where the policy begins to write.

        All of it is given text, whatever role its parts have: the prompt is never a target. A system message that the
        template refuses becomes the beginning of the first user message.
        """
        if not messages:
            raise ValueError("a prompt needs at least one message, got none")
        chat = self._given(messages)
        scaffold = self._template.scaffold(tuple(turn.role for turn in chat))
        return self._segments(self._lay_out(scaffold, chat), at_start=True)

    def render_observation(self, messages: Sequence[Message], *, turn: int, closed: bool) -> tuple[Segment, ...]:
        """What the history is extended by after an action, up to where the policy writes again.

        ``closed`` says that the action ended with ``end_of_turn_id``; where it did not, that token comes first, as
        TEMPLATE. A token over an edge is TEMPLATE, or between WARNING and ENV_OUTPUT, WARNING. Each segment carries
        the tool of its message.
        """
        chat = self._observed(messages, turn)
        scaffold = self._template.answer(tuple(turn.role for turn in chat))
        pieces = self._lay_out(scaffold, chat)
        first = next(pieces)
        if first.content != (self.end_of_turn_id,):
            raise RenderError(f"before {chat[0].role!r} messages the chat template ends a turn in another way")
        return self._segments(pieces if closed else (first, *pieces), turn=turn)

    def can_append(self, conversation: Sequence[Message | Action], observation: Sequence[Message]) -> bool:
        """Whether the observation may be appended to the history, or ``render_history`` has to write it anew.

        ``conversation`` is everything said so far, the action just sampled at its end. The template is asked with
        placeholders for all of it, once for each shape of conversation: what it wrote before the action must stand
        in what it writes after the observation, and the rest must be what ``render_observation`` appends.

        Raises:
            RenderError: it rewrites what is there, and ``on_drift`` is "stop"; or it cannot write this conversation.
        """
        *before, action = conversation
        if isinstance(action, Message):
            raise ValueError(f"the conversation ends with a {action.role!r} message; it has to end with the action")
        if self.config.thinking == "strip" and self._without_thinking(action) != action:
            return False
        history, roles = self._roles([*before]), self._roles(observation)
        if self._template.extends(history, roles):
            return True
        if self.config.on_drift == "stop":
            raise RenderError(
                f"after {len(conversation)} messages the chat template rewrites earlier turns when {list(roles)} "
                "follow, so the sampled history cannot be extended; set on_drift=fork to train the rewritten history "
                "as a sequence of its own, or use a template that only appends"
            )
        return False

    def render_history(
        self, conversation: Sequence[Message | Action], observation: Sequence[Message], *, turn: int, branch: int
    ) -> tuple[Segment, ...]:
        """The whole conversation as the template writes it now, and the observation, up to where the policy writes.

        What was said before is CONTEXT in its TEMPLATE, actions too; the observation has the roles of its parts.
        An action given by its ids keeps them, but for the thinking that ``thinking="strip"`` takes out.
        """
        chat = self._given(conversation)
        observed = self._observed(observation, turn)
        literals, escaped = self._template.scaffold(tuple(turn.role for turn in (*chat, *observed)))
        n = len(chat)
        before = self._lay_out(Scaffold(literals[:n], escaped[:n]), chat)
        after = self._lay_out(Scaffold(literals[n:], escaped[n:]), observed)
        segments = (*self._segments(before, at_start=True), *self._segments(after, turn=turn))
        return tuple(replace(segment, branch=branch) for segment in segments)

    def imitates_observation(self, token_ids: Sequence[int]) -> bool:
        """Whether an action holds what the template sets around observations, as control tokens or spelled out."""
        text = self.encoder.decode(self._without_stop(token_ids))
        return any(mark in text for mark in self._observation_marks)

    # --- actions ---

    def parse_action(self, token_ids: Sequence[int], stopped: bool) -> ParsedAction:
        """What sampled ids mean: calls to run, or an ``error`` to tell the policy. Never raises."""
        ended = bool(token_ids) and token_ids[-1] in self.stop_token_ids
        text, marks = self._decode_marks(token_ids[:-1] if ended else token_ids)
        return parse_reply(
            self._syntax,
            self.tools,
            Reply(text, stopped, self._thinking, marks),
            max_calls=self.config.max_calls_per_turn,
            which=self.config.which_calls,
            thinking=self.config.thinking != "off",
            tell_warnings=self.config.format_warnings,
        )

    def encode_action(self, call: ToolCall, text: str = "") -> tuple[int, ...]:
        """Return the ids of a well-written call after some text, with the stop token: for scripted policies.

        Where thinking is on, the text is thought.

        Raises:
            RenderError: the format cannot hold this call.
        """
        thinking = self.config.thinking != "off"
        pieces = write_reply(self._syntax, call, text, opened=self._thinking, thinking=thinking)
        return self._written(pieces)

    def encode_message(self, text: str, calls: Sequence[ToolCall] = (), reasoning: str = "") -> tuple[int, ...]:
        """Return the ids of an assistant's message that is known only as text and calls, with the stop token.

        Only marks of thinking and of calls become control tokens. A call that the format cannot hold is spelled out.
        ``reasoning`` stands before the text in think tags, where thinking is on.
        """
        thought = "" if self.config.thinking == "off" else reasoning
        pieces = write_message(self._syntax, text, calls, thought, marks=self._action_marks, opened=self._thinking)
        return self._written(pieces)

    def _written(self, pieces: Iterable[str]) -> tuple[int, ...]:
        items = (item for piece in pieces for item in (self._scan(piece) if isinstance(piece, Mark) else (piece,)))
        return (*self._encode(items), self.end_of_turn_id)

    def _decode_marks(self, token_ids: Sequence[int]) -> tuple[str, frozenset[int] | None]:
        """The text of sampled ids, and where the format's own tokens stand in it, if only those count."""
        if not self._syntax.are_tokens:
            return self.encoder.decode(token_ids), None
        tags = {self.encoder.control_ids[tag] for tag in tag_tokens(self.tools)}
        text, starts = "", set()
        for is_tag, run in groupby(token_ids, key=tags.__contains__):
            for piece in [[token] for token in run] if is_tag else [list(run)]:
                if is_tag:
                    starts.add(len(text))
                text += self.encoder.decode(piece)
        return text, frozenset(starts)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of anything a policy may write, control tokens recognised, with the stop token."""
        return (*self._encode(self._scan(text)), self.end_of_turn_id)

    # --- inside ---

    def _segments(
        self, pieces: Iterable[Piece], *, turn: int | None = None, at_start: bool = False
    ) -> tuple[Segment, ...]:
        tokens = self.encoder.encode(pieces, at_start=at_start)
        return tuple(
            Segment(role, tuple(token for token, _ in run), turn=turn, tool=tool)
            for (role, tool), run in groupby(tokens, key=lambda pair: (pair[1].role, pair[1].tool))
        )

    def _lay_out(self, scaffold: Scaffold, chat: Sequence[Turn]) -> Iterator[Piece]:
        """The bodies with the template's text around them, in which control tokens are control tokens."""
        for k, literal in enumerate(scaffold.literals):
            tool = chat[k].tool if k < len(chat) else chat[-1].pieces[-1].tool if chat[-1].pieces else chat[-1].tool
            yield from self._pieces(self._scan(literal), TokenRole.TEMPLATE, tool)
            for piece in chat[k].pieces if k < len(chat) else ():
                escaped = scaffold.escaped[k] and isinstance(piece.content, str)
                yield piece._replace(content=escape(clean_text(str(piece.content)))) if escaped else piece

    def _encode(self, items: Iterable[int | str]) -> list[int]:
        """Control tokens, and text in which there are none."""
        return [token for token, _ in self.encoder.encode(self._pieces(items, TokenRole.TEMPLATE))]

    @staticmethod
    def _pieces(items: Iterable[int | str], role: TokenRole, tool: str | None = None) -> Iterator[Piece]:
        return (Piece((item,) if isinstance(item, int) else item, role, tool) for item in items)

    # --- what is said, as turns of the chat template ---

    def _given(self, conversation: Sequence[Message | Action]) -> list[Turn]:
        """A conversation as CONTEXT, with how to call the tools at its head where the template does not say it."""
        said: list[Turn] = []
        for item in conversation:
            if isinstance(item, Message):
                said.append(Turn(item.role, tuple(Piece(part.text, TokenRole.CONTEXT) for part in item.parts)))
            else:
                said.append(Turn("assistant", self._kept(item)))
        if self._preamble:
            role, pieces, _ = said[0]
            told = (self._preamble, "\n\n") if role != "system" else ("\n\n", self._preamble)
            added = tuple(Piece(text, TokenRole.CONTEXT) for text in told)
            said[0] = Turn(role, (*pieces, *added) if role == "system" else (*added, *pieces))
        return self._dialogue.turns(said)

    def _observed(self, messages: Sequence[Message], turn: int) -> list[Turn]:
        if not messages:
            raise ValueError(f"observation of turn {turn} has no message; an empty answer is a message with no text")
        if any(part.role is TokenRole.ACTION for message in messages for part in message.parts):
            raise ValueError(f"observation of turn {turn} holds an ACTION part, but only the policy makes actions")
        return self._dialogue.turns(
            Turn(m.role, tuple(Piece(part.text, part.role, m.tool) for part in m.parts), m.tool) for m in messages
        )

    def _roles(self, said: Iterable[Message | Action]) -> Roles:
        return self._dialogue.roles(item.role if isinstance(item, Message) else "assistant" for item in said)

    # --- actions in a history that is written anew ---

    def _without_stop(self, token_ids: Sequence[int]) -> Sequence[int]:
        return token_ids[:-1] if token_ids and token_ids[-1] in self.stop_token_ids else token_ids

    def _kept(self, action: Action) -> tuple[Piece, ...]:
        """An action as it stands in a history: its ids, or for a decoded one text in which only marks are control."""
        action = self._without_thinking(action) if self.config.thinking == "strip" else action
        if not isinstance(action, str):
            return (Piece(tuple(self._without_stop(action)), TokenRole.CONTEXT),)
        return tuple(self._pieces(self.encoder.scan(action, self._action_marks), TokenRole.CONTEXT))

    def _without_thinking(self, action: Action) -> Action:
        """What is left of an action: all of it where nobody thought, nothing where the thinking had no end."""
        close = self.encoder.control_ids.get(THINK_CLOSE)
        if isinstance(action, str) or close is None:
            text = action if isinstance(action, str) else self.encoder.decode(self._without_stop(action))
            _, closed, rest = text.rpartition(THINK_CLOSE)
            if not closed and not self._thinking and THINK_OPEN not in text:
                return action
            return rest.lstrip("\n") if closed else ""
        ids = list(action)
        if close not in ids:
            opened = self._thinking or self.encoder.control_ids.get(THINK_OPEN) in ids
            return () if opened else action
        rest = ids[len(ids) - ids[::-1].index(close) :]
        blank = next((n for n, token in enumerate(rest) if self.encoder.decode([token]).strip("\n")), len(rest))
        return tuple(rest[blank:])

    # --- what is found out about the chat template ---

    def _open_dialogue(self, source: str, options: Mapping[str, Any]) -> tuple[Dialogue, str]:
        """The template at work, and what to tell about the tools where it does not, or not in the policy's format."""
        options = {"enable_thinking": self.config.thinking != "off", **options}
        bare = ChatTemplate(self.tokenizer, source, [], options)
        templates = [bare]
        if self._syntax.in_template and self.tools:
            told = ChatTemplate(self.tokenizer, source, tool_schemas(self.tools), options)
            said = "".join(told.scaffold(("user",)).literals) if told.takes(("user",)) else ""
            if all(tool.name in said for tool in self.tools) and self._syntax.taught_by(said):
                templates.insert(0, told)
        dialogue = open_dialogue(templates, self.config.on_drift)
        untold = dialogue.template is bare and bool(self.tools) and not self._syntax.taught_by("")
        return dialogue, self._syntax.instructions(how_many(self.config.max_calls_per_turn)) if untold else ""

    def _find_end(self) -> int:
        """The token that ends an assistant's message."""
        literal = self._template.answer((self._dialogue.tool_role,)).literals[0]
        first = next(iter(self._scan(literal)), None)
        if not isinstance(first, int):
            raise RenderError(
                f"the chat template ends an assistant's message with {literal[:40]!r}, which does not begin with a "
                "control token, so a turn has no end that a policy could sample"
            )
        return first

    def _find_marks(self) -> frozenset[str]:
        """The marks around an observation, less those that an action may hold."""
        literals = self._template.answer((self._dialogue.tool_role,)).literals
        control = {token: text for text, token in self.encoder.control_ids.items()}
        marks: set[str] = set()
        for item in (item for literal in literals for item in self._scan(literal)):
            marks |= {control[item]} if isinstance(item, int) else set(_MARK.findall(item))
        return frozenset(marks - self._action_marks)
