"""Between chat messages and token ids: what a message becomes, who made each of its tokens, what an action means.

History is never rendered twice. What the chat template puts around messages is found once, by rendering bodies
that are placeholders; from then on an observation is that scaffold with the real bodies in their places. Bodies
are encoded by a copy of the tokenizer that knows no control tokens, so text can never become one.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Protocol

from backtalk.envs.base import Message, ParsedAction, ToolCall, ToolSpec
from backtalk.errors import RenderError
from backtalk.tool_formats import (
    CALL_CLOSE,
    CALL_OPEN,
    THINK_OPEN,
    Tag,
    ToolFormat,
    hermes_instructions,
    hermes_json,
    hermes_schema,
    parse_hermes,
    parse_tags,
    split_tags,
    tag_arguments,
)
from backtalk.trajectory import Segment, TokenRole

# A token that reaches over an edge takes the earlier of these roles: template is no one's text, and a token that
# holds a piece of the harness's text is not what the world said.
_EDGE_ORDER = (TokenRole.TEMPLATE, TokenRole.CONTEXT, TokenRole.WARNING, TokenRole.ENV_OUTPUT)

_Piece = tuple[str, TokenRole]  # plain text and who wrote it; an int beside it is a control token of the template
_Scaffold = tuple[tuple[int | _Piece, ...], ...]  # what stands before, between and after the bodies


class ChatTokenizer(Protocol):
    """What is used of a transformers fast tokenizer, beside ``eos_token_id`` and ``pad_token_id`` if it has them."""

    @property
    def backend_tokenizer(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any: ...


def clean_text(text: str) -> str:
    """The same text with lone surrogates, which no encoding can hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Renderer:
    """One tokenizer, chat template and set of tools.

    ``tool_format`` None takes tags where the tokenizer has a token for each of them, else Hermes. ``template_options``
    go to the chat template, as ``{"enable_thinking": False}`` does.

    Raises:
        RenderError: the tokenizer is not a fast one, or the template cannot be extended turn by turn.
        ConfigError: the tools do not fit the format.
    """

    stop_token_ids: frozenset[int]  # any of them ends an action
    end_of_turn_id: int  # the one that the template ends an assistant's message with
    pad_token_id: int

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        tools: Sequence[ToolSpec],
        tool_format: ToolFormat | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tools = tuple(tools)
        self._options = dict(template_options or {})
        self._scaffolds: dict[tuple[str, ...], _Scaffold] = {}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RenderError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so nobody knows which characters a token "
                "covers; load it with AutoTokenizer from a folder that has a tokenizer.json"
            )
        self._backend = backend
        self._plain, self._control_ids = _without_control_tokens(backend)
        control = sorted(self._control_ids, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, control)) or r"(?!)")  # (?!) matches nothing
        self._control_id_set = frozenset(self._control_ids.values())
        tags = [Tag(tool.name, closing) for tool in tools for closing in (False, True)]
        has_tags = bool(tags) and all(str(tag) in self._control_ids for tag in tags)
        self._tags = {self._control_ids[str(tag)]: tag for tag in tags} if has_tags else {}
        self.tool_format = tool_format or (ToolFormat.TAGS if has_tags else ToolFormat.HERMES)
        self._arguments = tag_arguments(tools) if self.tool_format is ToolFormat.TAGS else {}
        self._schemas = [hermes_schema(tool) for tool in tools] if self.tool_format is ToolFormat.HERMES else []
        self._preamble = self._missing_instructions()
        self._thinking = self._literals(["user"])[-1].rstrip().endswith(THINK_OPEN)  # before every reply
        self._tool_role, self.end_of_turn_id = self._find_turn()
        eos, pad = (getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id"))
        self.stop_token_ids = frozenset({self.end_of_turn_id} | (self._control_id_set & {eos, pad}))
        self.pad_token_id = self.end_of_turn_id if pad is None else pad

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tools: Sequence[ToolSpec],
        tool_format: ToolFormat | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Renderer:
        """Load the tokenizer of a model folder or name; imports transformers."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(path), tools, tool_format, template_options)

    # --- messages to tokens ---

    def render_prompt(self, messages: Sequence[Message]) -> tuple[Segment, ...]:
        """System and task as CONTEXT in their TEMPLATE, up to where the policy begins to write.

        All of it is given text, whatever role its parts have: the prompt is never a target.
        """
        if not messages:
            raise ValueError("a prompt needs at least one message, got none")
        bodies = [[(part.text, TokenRole.CONTEXT) for part in message.parts] for message in messages]
        if self._preamble and messages[0].role == "system":
            bodies[0].append(("\n\n" + self._preamble, TokenRole.CONTEXT))
        elif self._preamble:
            bodies[0].insert(0, (self._preamble + "\n\n", TokenRole.CONTEXT))
        roles = tuple(message.role for message in messages)
        return self._render(self._prompt_scaffold(roles), bodies, turn=None, tool=None)

    def render_observation(
        self, messages: Sequence[Message], *, turn: int, tool: str | None, closed: bool
    ) -> tuple[Segment, ...]:
        """What the history is extended by after an action, up to where the policy writes again.

        ``closed`` says that the action ended with ``end_of_turn_id``; where it did not, that token comes first, as
        TEMPLATE. A token over an edge is TEMPLATE, or between WARNING and ENV_OUTPUT, WARNING.
        """
        if not messages:
            raise ValueError(f"observation of turn {turn} has no message; an empty answer is a message with no text")
        bodies = [[(part.text, part.role) for part in message.parts] for message in messages]
        if any(role is TokenRole.ACTION for body in bodies for _, role in body):
            raise ValueError(f"observation of turn {turn} holds an ACTION part, but only the policy makes actions")
        scaffold = self._observation_scaffold(tuple(self._chat_role(message.role) for message in messages))
        if not closed:
            scaffold = ((self.end_of_turn_id, *scaffold[0]), *scaffold[1:])
        return self._render(scaffold, bodies, turn=turn, tool=tool)

    # --- actions ---

    def parse_action(self, token_ids: Sequence[int], stopped: bool) -> ParsedAction:
        """What sampled ids mean. Where they hold no whole call, ``error`` is what to tell the policy."""
        ended = bool(token_ids) and token_ids[-1] in self.stop_token_ids
        ids = token_ids[:-1] if ended else token_ids
        text = self._decode(ids)
        match self.tool_format:
            case ToolFormat.TAGS:
                spans = self._tag_spans(ids) if self._tags else split_tags(text, list(self._arguments))
                result = parse_tags(spans, self._arguments, stopped=stopped)
            case ToolFormat.HERMES:
                result = parse_hermes(text, stopped=stopped, thinking=self._thinking)
        if isinstance(result, str):
            return ParsedAction(text, None, result)
        arguments = {clean_text(name): clean_text(value) for name, value in result.arguments.items()}
        return ParsedAction(text, ToolCall(clean_text(result.tool), arguments))

    def encode_action(self, call: ToolCall, text: str = "") -> tuple[int, ...]:
        """The ids of a well-written call after some text, with the stop token: for scripted policies."""
        match self.tool_format:
            case ToolFormat.TAGS:
                body = call.arguments[self._arguments[call.tool]]
                pieces = [text, Tag(call.tool), body, Tag(call.tool, closing=True)]
            case ToolFormat.HERMES:
                pieces = [text + "\n" * bool(text), CALL_OPEN, f"\n{hermes_json(call)}\n", CALL_CLOSE]
        items: list[int | _Piece] = []
        for k, piece in enumerate(pieces):  # the second and fourth are markup, the others somebody's text
            items += self._scan(str(piece)) if k % 2 else [(str(piece), TokenRole.TEMPLATE)]
        return (*(token for token, _ in self._encode(items)), self.end_of_turn_id)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of anything a policy may write, control tokens recognised, with the stop token."""
        return (*(token for token, _ in self._encode(self._scan(text))), self.end_of_turn_id)

    # --- inside ---

    def _render(
        self, scaffold: _Scaffold, bodies: Sequence[Sequence[_Piece]], *, turn: int | None, tool: str | None
    ) -> tuple[Segment, ...]:
        items: list[int | _Piece] = list(scaffold[0])
        for body, after in zip(bodies, scaffold[1:], strict=True):
            items += body
            items += after
        return tuple(
            Segment(role, tuple(token for token, _ in run), turn=turn, tool=tool)
            for role, run in groupby(self._encode(items), key=lambda pair: pair[1])
        )

    def _encode(self, items: Iterable[int | _Piece]) -> list[tuple[int, TokenRole]]:
        """Tokens with roles. Text between two control tokens is encoded as one, as the policy has seen it."""
        tokens: list[tuple[int, TokenRole]] = []
        for is_control, run in groupby(items, key=lambda item: isinstance(item, int)):
            if is_control:
                tokens += [(item, TokenRole.TEMPLATE) for item in run if isinstance(item, int)]
            else:
                tokens += self._encode_run([item for item in run if not isinstance(item, int)])
        return tokens

    def _encode_run(self, run: Iterable[_Piece]) -> Iterable[tuple[int, TokenRole]]:
        pieces = [(clean_text(text), role) for text, role in run if text]
        encoding = self._plain.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        if not self._control_id_set.isdisjoint(encoding.ids):
            raise RenderError("plain text became a control token; this tokenizer cannot tell the two apart")
        if len({role for _, role in pieces}) <= 1:
            return [(token, pieces[0][1]) for token in encoding.ids]
        ends = list(accumulate(len(text) for text, _ in pieces))
        roles: list[TokenRole] = []
        for start, end in encoding.offsets:  # in characters of the joined text
            first, last = bisect_right(ends, start), bisect_left(ends, end)
            if first >= last:
                roles.append(pieces[min(first, len(pieces) - 1)][1])
            else:
                roles.append(min((role for _, role in pieces[first : last + 1]), key=_EDGE_ORDER.index))
        return zip(encoding.ids, roles, strict=True)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def _tag_spans(self, token_ids: Sequence[int]) -> list[str | Tag]:
        """Cut at tag tokens, so that a tag spelled out in plain tokens is only text."""
        spans: list[str | Tag] = []
        text: list[int] = []
        for token in token_ids:
            if token in self._tags:
                spans += [self._decode(text), self._tags[token]]
                text = []
            else:
                text.append(token)
        return [*spans, self._decode(text)]

    def _scan(self, text: str) -> tuple[int | _Piece, ...]:
        """Text with its control tokens found."""
        items: list[int | _Piece] = []
        position = 0
        for match in self._control_pattern.finditer(text):
            items += [(text[position : match.start()], TokenRole.TEMPLATE), self._control_ids[match[0]]]
            position = match.end()
        items.append((text[position:], TokenRole.TEMPLATE))
        return tuple(item for item in items if isinstance(item, int) or item[0])

    # --- the chat template, rendered with placeholders ---

    def _literals(self, roles: Sequence[str], *, generation_prompt: bool = True) -> list[str]:
        """What the template writes before, between and after the bodies of a conversation."""
        # Private-use characters at the edges, which nobody trims; between them what JSON or HTML would write otherwise.
        bodies = [f'\ue000{number}\n"\\<&\ue001' for number in range(len(roles))]
        conversation = [{"role": role, "content": body} for role, body in zip(roles, bodies, strict=True)]
        try:
            rest = self.tokenizer.apply_chat_template(
                conversation,
                tools=self._schemas or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self._options,
            )
        except Exception as error:  # templates are programs, and raise what they like
            raise RenderError(f"the chat template cannot render a conversation of {list(roles)}: {error}") from error
        literals: list[str] = []
        for body, role in zip(bodies, roles, strict=True):
            before, found, rest = rest.partition(body)
            if not found:
                raise RenderError(f"the chat template drops, rewrites or reorders a {role!r} message in {list(roles)}")
            literals.append(before)
        if any(body in literal for literal in (*literals, rest) for body in bodies):
            raise RenderError(f"the chat template writes a message of {list(roles)} twice")
        return [*literals, rest]

    def _prompt_scaffold(self, roles: tuple[str, ...]) -> _Scaffold:
        key = ("prompt", *roles)
        if key not in self._scaffolds:
            self._scaffolds[key] = tuple(self._scan(literal) for literal in self._literals(roles))
        return self._scaffolds[key]

    def _observation_scaffold(self, roles: tuple[str, ...]) -> _Scaffold:
        """What comes after an assistant's message that is closed, around an observation of these chat roles."""
        key = ("observation", *roles)
        if key not in self._scaffolds:
            first, *rest = (self._scan(literal) for literal in self._delta(roles))
            self._scaffolds[key] = (first[1:], *rest)  # without the end of turn, which the policy samples
        return self._scaffolds[key]

    def _delta(self, roles: tuple[str, ...]) -> list[str]:
        """What an observation adds, from the end of the assistant's body on.

        Raises:
            RenderError: it depends on how long the history is, or what came before is rewritten.
        """
        prompt = self._literals(["user"])
        once = self._literals(["user", "assistant", *roles])
        twice = self._literals(["user", "assistant", *roles, "assistant", *roles])
        delta, n = once[2:], len(roles)
        # The prompt to write may say more than the header of a message in history does, as an opened <think>.
        extends = (
            prompt[0] == once[0] == twice[0]
            and prompt[1].startswith(once[1])
            and once[1] == twice[1]
            and twice[2 : 2 + n] == delta[:n]
            and delta[n].startswith(twice[2 + n])
            and twice[3 + n :] == delta
        )
        if not extends:
            raise RenderError(
                f"the chat template rewrites earlier turns when {list(roles)} messages follow, so a sampled history "
                "cannot be extended; use a template that only appends"
            )
        return delta

    def _find_turn(self) -> tuple[str, int]:
        """The chat role that carries observations and the token that ends an assistant's message."""
        try:
            role, delta = "tool", self._delta(("tool",))
        except RenderError:  # a template that knows no tool messages; a user's have to do
            role, delta = "user", self._delta(("user",))
        first = next(iter(self._scan(delta[0])), None)
        if not isinstance(first, int):
            raise RenderError(
                f"the chat template ends an assistant's message with {delta[0][:40]!r}, which does not begin with a "
                "control token, so a turn has no end that a policy could sample"
            )
        return role, first

    def _chat_role(self, role: str) -> str:
        return self._tool_role if role == "tool" else role

    def _missing_instructions(self) -> str:
        """How to call the tools, where the template does not say it, or says it in another format. Tags say nothing."""
        said = "".join(self._literals(["user"]))
        if not self._schemas or (CALL_OPEN in said and all(f'"{tool.name}"' in said for tool in self.tools)):
            return ""
        self._schemas = []
        return hermes_instructions(self.tools)


def _without_control_tokens(backend: Any) -> tuple[Any, dict[str, int]]:
    """A copy of a tokenizer that takes control tokens for plain text, and the ids of those by their text.

    Control is every added token but runs of white space: a template's marks such as ``</tool_response>`` are often
    not flagged as special, and must not be open to the world for that.
    """
    state = json.loads(backend.to_str())
    control: dict[str, int] = {}
    for token in state["added_tokens"]:
        token["special"] = bool(token["content"].replace("\u2581", " ").strip())  # a way to write a space
        if token["special"]:
            control[token["content"]] = token["id"]
    state.update(post_processor=None, truncation=None, padding=None)  # no begin token, nothing cut, whole offsets
    plain = type(backend).from_str(json.dumps(state))
    plain.encode_special_tokens = True
    leaked = [text for text, token in control.items() if token in plain.encode(text, add_special_tokens=False).ids]
    if leaked:
        raise RenderError(f"this tokenizer makes control tokens of the plain text {leaked[:3]}; it cannot be used")
    return plain, control
