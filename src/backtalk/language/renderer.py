"""Render chat messages to token ids with the role of each token, and parse sampled token ids into tool calls.

Hugging Face's ``apply_chat_template`` renders a whole conversation and does not say who wrote which token. Called again
each turn, it would tokenize anew what the policy sampled, and some templates also rewrite earlier turns. This renderer
renders each message once:

1. The template is run on placeholders in place of the messages' texts. What it writes around them is the *scaffold* of
   a conversation with these chat roles (backtalk.language.template).
2. The texts are put into the scaffold. The template's own tokens are TEMPLATE; the tokens of a message have the roles
   of its parts and cannot be control tokens (backtalk.language.encoder).
3. ``render_prompt`` renders system and task. Sampled ids are appended unchanged. ``render_observation`` renders only
   what follows an action, up to the next generation prompt.
4. ``can_append`` compares scaffolds each turn, to prove that the template would have left the history as it is. If it
   would not, a RenderError is raised, or ``render_history`` renders the conversation anew as a branch of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

from backtalk.errors import ConfigError, RenderError
from backtalk.language.action_end import ActionEnd
from backtalk.language.chat_rules import ChatMessage, choose_rules
from backtalk.language.encoder import Piece, get_encoder
from backtalk.language.template import ChatTokenizer, Roles, Scaffold, escape_json, template_source
from backtalk.language.tokenizer import load_tokenizer
from backtalk.language.tool_formats import ToolFormat, detect_format, make_syntax, tag_tokens
from backtalk.language.tool_formats.base import CALL_CLOSE, CALL_OPEN, THINK_CLOSE, THINK_OPEN, Mark, Reply
from backtalk.language.tool_formats.reply import call_limit, parse_reply, write_message, write_reply
from backtalk.language.tool_formats.schemas import refuse_control_tokens
from backtalk.messages import Message, ParsedAction, ToolCall, ToolSpec, clean_text
from backtalk.settings import check_choices
from backtalk.trajectory import Segment, TokenRole

Action = str | Sequence[int]  # an assistant's message: its text, or better the sampled ids

_MARK = re.compile(r"</?[^\s<>]{1,40}>|\[/?[A-Z_]{2,40}\]")  # marks as templates write them, <name> or [NAME]


@dataclass(frozen=True, kw_only=True, slots=True)
class RendererConfig:
    """Settings of the renderer."""

    tool_format: ToolFormat | None = None
    """How calls are written; null is the format that the model was trained on, see detect_format."""
    thinking: Literal["off", "keep", "strip"] = "off"
    """off asks the template for none; keep leaves it in the history; strip removes it after its turn (a new branch)."""
    on_drift: Literal["stop", "fork"] = "stop"
    """If the chat template rewrites earlier turns: raise an error, or begin a new branch."""
    max_calls_per_turn: int = 1
    """Tool calls that are run of one action."""
    which_calls: Literal["first", "last"] = "first"
    """Which of them, if an action holds more."""
    stop_after_call: bool = True
    """End an action after its calls if the policy goes on instead of ending its turn; what it sampled there is dropped.

    It needs a tool_format with a closing mark: all but llama3_json and plain.
    """
    format_warnings: bool = False
    """Put a WARNING before the observation for faults of form in calls that could be read."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_calls_per_turn < 1:
            raise ConfigError(f"max_calls_per_turn={self.max_calls_per_turn} leaves no room for a call; use 1 or more")


class Renderer:
    """A renderer and parser for one tokenizer, its chat template and one set of tools.

    ``template_options`` are passed to the chat template, for example ``{"date_string": "1 Jan 2025"}``.

    Raises:
        RenderError: the tokenizer is not a fast one; the template raises, or drops or repeats messages; or it rewrites
            earlier turns and ``on_drift`` is "stop".
        ConfigError: the tools do not fit the format.
    """

    stop_token_ids: frozenset[int]  # each of them ends an action
    end_of_turn_id: int  # the stop token with which the template ends an assistant's message
    pad_token_id: int
    action_end: ActionEnd | None  # finds the end of an action's calls; None if stop_after_call is off or has no mark
    append_only: bool  # whether no turn needs a new branch, as far as can be known before the conversation

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        tools: Sequence[ToolSpec],
        config: RendererConfig = RendererConfig(),
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.tools, self.config = tokenizer, tuple(tools), config
        self._for_tools = lru_cache(64)(lambda others: Renderer(tokenizer, others, config, template_options))
        self.encoder = get_encoder(tokenizer)
        self._split_controls = lru_cache(4096)(self.encoder.split_controls)
        refuse_control_tokens(self.tools, self.encoder.control_ids)
        source = template_source(tokenizer, self.encoder.control_ids)
        self.tool_format = config.tool_format or detect_format(source, self.encoder.control_ids, self.tools)
        self._syntax = make_syntax(self.tool_format, self.tools, self.encoder.control_ids)
        options = {"enable_thinking": config.thinking != "off", **(template_options or {})}
        self._rules = choose_rules(tokenizer, source, self._syntax, self.tools, options, config.on_drift)
        self._template = self._rules.template
        self.append_only = self._rules.append_only and config.thinking != "strip"
        generation_prompt = self._template.scaffold(("user",)).literals[-1]
        self._opens_thinking = generation_prompt.rstrip().endswith(THINK_OPEN)
        self.end_of_turn_id = self._find_end_of_turn()
        eos, pad = (getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id"))
        ends = {eos, pad} | getattr(tokenizer, "stated_stop_ids", frozenset())
        self.stop_token_ids = frozenset({self.end_of_turn_id} | (self.encoder.control_id_set & ends))
        self.pad_token_id = self.end_of_turn_id if pad is None else pad
        self._action_marks = frozenset(
            {CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE, "<|python_tag|>", *tag_tokens(self.tools)}
        )
        self._observation_marks = self._find_observation_marks()
        stops = config.stop_after_call and bool(self.tools) and bool(self._syntax.closings)
        max_calls = config.max_calls_per_turn if config.which_calls == "first" else None
        self.action_end = ActionEnd(self._syntax, max_calls, self._read_ids) if stops else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tools: Sequence[ToolSpec],
        config: RendererConfig = RendererConfig(),
        template_options: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """Return the renderer of a model's folder or Hugging Face name; this imports transformers."""
        return cls(load_tokenizer(path), tools, config, template_options)

    def for_tools(self, tools: Sequence[ToolSpec]) -> Renderer:
        """Return the same renderer for other tools, such as those of a rollout's environment; each set is cached."""
        return self if tuple(tools) == self.tools else self._for_tools(tuple(tools))

    def render_prompt(self, messages: Sequence[Message]) -> tuple[Segment, ...]:
        """Render system and task messages as CONTEXT and TEMPLATE segments, the generation prompt at their end.

        Their texts become CONTEXT whatever roles their parts have: no token of the prompt is a target.
        """
        if not messages:
            raise ValueError("a prompt needs at least one message, got none")
        chat = self._context_messages(messages)
        scaffold = self._template.scaffold(tuple(message.role for message in chat))
        return self._segments(self._fill(scaffold, chat), at_start=True)

    def render_observation(self, messages: Sequence[Message], *, turn: int, closed: bool) -> tuple[Segment, ...]:
        """Render what follows an action: the observation, and the generation prompt of the next action.

        ``closed`` says that the action ended with ``end_of_turn_id``; if not, that token comes first, as TEMPLATE. A
        token that covers characters of two roles is TEMPLATE if one of them is, else WARNING. Each segment has the tool
        of its message.

        Raises:
            RenderError: the template ends an assistant's message in another way before these messages.
        """
        chat = self._observation_messages(messages, turn)
        scaffold = self._template.observation_scaffold(tuple(message.role for message in chat))
        pieces = self._fill(scaffold, chat)
        first = next(pieces)
        if first.content != (self.end_of_turn_id,):
            raise RenderError(f"before {chat[0].role!r} messages the chat template ends a turn in another way")
        return self._segments(pieces if closed else (first, *pieces), turn=turn)

    def can_append(self, conversation: Sequence[Message | Action], observation: Sequence[Message]) -> bool:
        """Return whether the observation may be appended to the history; if not, call ``render_history``.

        ``conversation`` is all so far, the last action at its end. It may be appended if the scaffold of the whole
        conversation with the observation begins with the scaffold from before the action, and goes on with what
        ``render_observation`` appends. The answer is cached by the chat roles of the conversation.

        Raises:
            RenderError: the template rewrites the history and ``on_drift`` is "stop"; or it cannot render it.
        """
        *before, action = conversation
        if isinstance(action, Message):
            raise ValueError(f"the conversation ends with a {action.role!r} message; it has to end with the action")
        if self.config.thinking == "strip" and self._without_thinking(action) != action:
            return False
        history, roles = self._roles(before), self._roles(observation)
        if self._template.keeps_history(history, roles):
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
        """Render the whole conversation anew as a branch: what ``render_prompt`` and ``render_observation`` return.

        The conversation is CONTEXT and TEMPLATE, its actions too; the observation has the roles of its parts. Sampled
        ids stay as they are, but for the thinking that ``thinking="strip"`` removes.
        """
        chat = self._context_messages(conversation)
        observed = self._observation_messages(observation, turn)
        literals, escaped = self._template.scaffold(tuple(message.role for message in (*chat, *observed)))
        n = len(chat)
        before = self._fill(Scaffold(literals[:n], escaped[:n]), chat)
        after = self._fill(Scaffold(literals[n:], escaped[n:]), observed)
        segments = (*self._segments(before, at_start=True), *self._segments(after, turn=turn))
        return tuple(replace(segment, branch=branch) for segment in segments)

    def imitates_observation(self, token_ids: Sequence[int]) -> bool:
        """Return whether an action has marks in it that the template writes around observations, as tokens or text."""
        text = self.encoder.decode(self._without_stop(token_ids))
        return any(mark in text for mark in self._observation_marks)

    def parse_action(self, token_ids: Sequence[int], stopped: bool) -> ParsedAction:
        """Return the calls of an action, or an ``error`` for the policy; this raises nothing.

        ``stopped`` is False if the token limit cut the action.
        """
        return parse_reply(
            self._syntax,
            self.tools,
            self._read_ids(token_ids, stopped),
            max_calls=self.config.max_calls_per_turn,
            which=self.config.which_calls,
            thinking=self.config.thinking != "off",
            report_warnings=self.config.format_warnings,
        )

    def encode_action(self, call: ToolCall, text: str = "") -> tuple[int, ...]:
        """Return the ids of an action that a scripted policy makes: some text, a call and the stop token.

        If thinking is on, the text is the thinking.

        Raises:
            RenderError: the format cannot hold this call.
        """
        thinking = self.config.thinking != "off"
        pieces = write_reply(self._syntax, call, text, opened=self._opens_thinking, thinking=thinking)
        return self._encode_written(pieces)

    def encode_message(self, text: str, calls: Sequence[ToolCall] = (), reasoning: str = "") -> tuple[int, ...]:
        """Return the ids of an assistant's message of which only text and calls are known, with the stop token.

        Only marks of thinking and calls become control tokens. A call that the format cannot hold is written as text.
        ``reasoning`` is put before the text in think tags if thinking is on.
        """
        reasoning = "" if self.config.thinking == "off" else reasoning
        pieces = write_message(
            self._syntax, text, calls, reasoning, marks=self._action_marks, opened=self._opens_thinking
        )
        return self._encode_written(pieces)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Return the ids of an action's text, in which control tokens are recognised, with the stop token."""
        return (*self._encode(self._split_controls(text)), self.end_of_turn_id)

    def _encode_written(self, pieces: Iterable[str]) -> tuple[int, ...]:
        split = (self._split_controls(piece) if isinstance(piece, Mark) else (piece,) for piece in pieces)
        return (*self._encode(chain.from_iterable(split)), self.end_of_turn_id)

    def _read_ids(self, token_ids: Sequence[int], stopped: bool) -> Reply:
        text, marks = self._decode_marks(self._without_stop(token_ids))
        return Reply(text, stopped, self._opens_thinking, marks)

    def _decode_marks(self, token_ids: Sequence[int]) -> tuple[str, frozenset[int] | None]:
        """Return the text of sampled ids, and the positions of the format's tokens in it if only tokens are marks."""
        if not self._syntax.marks_are_tokens:
            return self.encoder.decode(token_ids), None
        tags = {self.encoder.control_ids[tag] for tag in tag_tokens(self.tools)}
        text, starts = "", set()
        for is_tag, run in groupby(token_ids, key=tags.__contains__):
            for piece in [[token] for token in run] if is_tag else [list(run)]:
                if is_tag:
                    starts.add(len(text))
                text += self.encoder.decode(piece)
        return text, frozenset(starts)

    def _segments(
        self, pieces: Iterable[Piece], *, turn: int | None = None, at_start: bool = False
    ) -> tuple[Segment, ...]:
        tokens = self.encoder.encode(pieces, at_start=at_start)
        return tuple(
            Segment(role, tuple(token for token, _ in run), turn=turn, tool=tool)
            for (role, tool), run in groupby(tokens, key=lambda pair: (pair[1].role, pair[1].tool))
        )

    def _fill(self, scaffold: Scaffold, chat: Sequence[ChatMessage]) -> Iterator[Piece]:
        """Yield the scaffold's texts, split at control tokens, and the bodies of the messages in turn."""
        for k, literal in enumerate(scaffold.literals):
            tool = chat[k].tool if k < len(chat) else chat[-1].pieces[-1].tool if chat[-1].pieces else chat[-1].tool
            yield from self._pieces(self._split_controls(literal), TokenRole.TEMPLATE, tool)
            for piece in chat[k].pieces if k < len(chat) else ():
                escaped = scaffold.escaped[k] and isinstance(piece.content, str)
                yield piece._replace(content=escape_json(clean_text(str(piece.content)))) if escaped else piece

    def _encode(self, items: Iterable[int | str]) -> list[int]:
        return [token for token, _ in self.encoder.encode(self._pieces(items, TokenRole.TEMPLATE))]

    @staticmethod
    def _pieces(items: Iterable[int | str], role: TokenRole, tool: str | None = None) -> Iterator[Piece]:
        return (Piece((item,) if isinstance(item, int) else item, role, tool) for item in items)

    def _context_messages(self, conversation: Sequence[Message | Action]) -> list[ChatMessage]:
        """Return a conversation as CONTEXT, with instructions for tool calls in its first message if there are any."""
        chat: list[ChatMessage] = []
        for item in conversation:
            if isinstance(item, Message):
                chat.append(ChatMessage(item.role, tuple(Piece(part.text, TokenRole.CONTEXT) for part in item.parts)))
            else:
                chat.append(ChatMessage("assistant", self._action_pieces(item)))
        if self.tools and not self._rules.explains_tools:
            text = self._syntax.instructions(call_limit(self.config.max_calls_per_turn))
            instructions, blank = Piece(text, TokenRole.CONTEXT), Piece("\n\n", TokenRole.CONTEXT)
            role, pieces, _ = chat[0]
            pieces = (*pieces, blank, instructions) if role == "system" else (instructions, blank, *pieces)
            chat[0] = ChatMessage(role, pieces)
        return self._rules.merge(chat)

    def _observation_messages(self, messages: Sequence[Message], turn: int) -> list[ChatMessage]:
        """Return the messages of an observation, with the roles of their parts."""
        if not messages:
            raise ValueError(f"observation of turn {turn} has no message; an empty answer is a message with no text")
        if any(part.role is TokenRole.ACTION for message in messages for part in message.parts):
            raise ValueError(f"observation of turn {turn} holds an ACTION part, but only the policy makes actions")
        return self._rules.merge(
            ChatMessage(m.role, tuple(Piece(part.text, part.role, m.tool) for part in m.parts), m.tool)
            for m in messages
        )

    def _roles(self, conversation: Iterable[Message | Action]) -> Roles:
        return self._rules.merge_roles(item.role if isinstance(item, Message) else "assistant" for item in conversation)

    def _without_stop(self, token_ids: Sequence[int]) -> Sequence[int]:
        return token_ids[:-1] if token_ids and token_ids[-1] in self.stop_token_ids else token_ids

    def _action_pieces(self, action: Action) -> tuple[Piece, ...]:
        """Return an action as CONTEXT: its ids, or its text, in which only marks of calls and thinking are control."""
        action = self._without_thinking(action) if self.config.thinking == "strip" else action
        if not isinstance(action, str):
            return (Piece(tuple(self._without_stop(action)), TokenRole.CONTEXT),)
        return tuple(self._pieces(self.encoder.split_controls(action, self._action_marks), TokenRole.CONTEXT))

    def _without_thinking(self, action: Action) -> Action:
        """Return an action without its thinking: unchanged if there is none, empty if the thinking was not closed."""
        close = self.encoder.control_ids.get(THINK_CLOSE)
        if isinstance(action, str) or close is None:
            text = action if isinstance(action, str) else self.encoder.decode(self._without_stop(action))
            _, closed, rest = text.rpartition(THINK_CLOSE)
            if not closed and not self._opens_thinking and THINK_OPEN not in text:
                return action
            return rest.lstrip("\n") if closed else ""
        ids = list(action)
        if close not in ids:
            opened = self._opens_thinking or self.encoder.control_ids.get(THINK_OPEN) in ids
            return () if opened else action
        rest = ids[len(ids) - ids[::-1].index(close) :]
        blank = next((n for n, token in enumerate(rest) if self.encoder.decode([token]).strip("\n")), len(rest))
        return tuple(rest[blank:])

    def _find_end_of_turn(self) -> int:
        """Return the token with which the template ends an assistant's message."""
        literal = self._template.observation_scaffold((self._rules.tool_role,)).literals[0]
        first = next(iter(self._split_controls(literal)), None)
        if not isinstance(first, int):
            raise RenderError(
                f"the chat template ends an assistant's message with {literal[:40]!r}, which does not begin with a "
                "control token, so a turn has no end that a policy could sample"
            )
        return first

    def _find_observation_marks(self) -> frozenset[str]:
        """Return the marks that the template writes around an observation, without those that an action may contain."""
        literals = self._template.observation_scaffold((self._rules.tool_role,)).literals
        control_texts = {token: text for text, token in self.encoder.control_ids.items()}
        marks: set[str] = set()
        for item in chain.from_iterable(map(self._split_controls, literals)):
            marks |= {control_texts[item]} if isinstance(item, int) else set(_MARK.findall(item))
        return frozenset(marks - self._action_marks)
