"""What a chat template writes around messages: found by rendering bodies that are placeholders.

A chat template is a program, and nobody says what it does. So nothing here is a list of model families: whether it
takes system and tool messages, whether it escapes them, where a turn ends and whether what it wrote stays as it was
when more follows is found out by asking it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from backtalk.errors import RenderError

Roles = tuple[str, ...]  # the chat roles of a conversation, which is all a scaffold depends on

# Templates that print today's date would make a run depend on the day it is started. Llama 3's own default date.
FIXED_DATE = date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_SHAPES_KEPT = 2048
_EMPTY_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")


class ChatTokenizer(Protocol):
    """What is used of a transformers fast tokenizer, beside its eos, bos and pad tokens if it has them."""

    @property
    def backend_tokenizer(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any: ...


class Scaffold(NamedTuple):
    """``literals`` stand before, between and after the bodies; ``escaped`` bodies are written as inside JSON."""

    literals: tuple[str, ...]
    escaped: tuple[bool, ...]


def plain_template(control: Mapping[str, int], eos: str | None) -> str:
    """Our own format, for a tokenizer without a chat template: ChatML where it has the tokens for that, else

        <bos>user:\\n{text}<eos>\\nassistant:\\n{text}<eos>\\n

    Raises:
        RenderError: the tokenizer has no token that could end a turn.
    """
    if "<|im_start|>" in control and "<|im_end|>" in control:
        before, middle, after = "<|im_start|>", "\\n", "<|im_end|>\\n"
    elif eos in control:
        before, middle, after = "", ":\\n", "' + eos_token + '\\n"
    else:
        raise RenderError(
            "this tokenizer has neither a chat template nor an end-of-text token, so a turn would have no end; "
            "set tokenizer.chat_template, or take a tokenizer with an eos_token"
        )
    return (
        "{{ bos_token }}{% for m in messages %}"
        f"{{{{ '{before}' + m['role'] + '{middle}' + m['content'] + '{after}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{before}assistant{middle}' }}}}{{% endif %}}"
    )


def template_source(tokenizer: Any) -> str | None:
    """The text of the tokenizer's template, the default one where it has several; None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, Mapping):
        return template or None
    if "default" not in template:
        raise RenderError(
            f"the tokenizer has the chat templates {sorted(template)} and none is the default; "
            "set tokenizer.chat_template to the one to use"
        )
    return template["default"]


def source_of(tokenizer: Any, control: Mapping[str, int]) -> str:
    """Return the text of the tokenizer's template; where it has none, our own format, with a warning."""
    source = template_source(tokenizer)
    if source is None:
        source = plain_template(control, getattr(tokenizer, "eos_token", None))
        warnings.warn(f"the tokenizer has no chat template; Backtalk's own is used: {source}", stacklevel=3)
    return source


class ChatTemplate:
    """One template with one set of tools and options. What it writes is kept by the roles of the conversation."""

    def __init__(
        self, tokenizer: Any, source: str, schemas: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._source = _TODAY.sub(lambda match: repr(FIXED_DATE.strftime(match[2])), source)
        self._schemas = list(schemas)
        self._options = dict(options)
        self.scaffold = lru_cache(_SHAPES_KEPT)(self._scaffold)
        self.extends = lru_cache(_SHAPES_KEPT)(self._extends)

    def write(self, conversation: Sequence[Mapping[str, Any]]) -> str:
        """The conversation and the prompt to write the next message."""
        try:
            return self._tokenizer.apply_chat_template(
                list(conversation),
                chat_template=self._source,
                tools=self._schemas or None,
                add_generation_prompt=True,
                tokenize=False,
                **self._options,
            )
        except Exception as error:  # templates are programs, and raise what they like
            roles = [message["role"] for message in conversation]
            raise RenderError(f"the chat template cannot render a conversation of {roles}: {error}") from error

    def takes(self, roles: Roles) -> bool:
        try:
            self.scaffold(roles)
        except RenderError:
            return False
        return True

    def _scaffold(self, roles: Roles) -> Scaffold:
        """
        Raises:
            RenderError: the template raises, or a message is dropped, rewritten, moved or written twice.
        """
        # Private-use characters at the edges, which nobody trims; between them what JSON or HTML would write otherwise.
        bodies = [f'\ue000{number}\n"\\<&\ue001' for number in range(len(roles))]
        rest = self.write([{"role": role, "content": body} for role, body in zip(roles, bodies, strict=True)])
        literals: list[str] = []
        escaped: list[bool] = []
        for body, role in zip(bodies, roles, strict=True):
            before, found, after = rest.partition(body)
            escaped.append(not found)
            if not found:
                before, found, after = rest.partition(escape(body))
            if not found:
                raise RenderError(f"the chat template drops, rewrites or reorders a {role!r} message in {list(roles)}")
            literals.append(before)
            rest = after
        if any("\ue000" in literal or "\ue001" in literal for literal in (*literals, rest)):
            raise RenderError(f"the chat template writes a message of {list(roles)} twice")
        return Scaffold((*literals, rest), tuple(escaped))

    def answer(self, roles: Roles) -> Scaffold:
        """What follows the body of an assistant's message when messages of these roles come after it."""
        literals, escaped = self.scaffold(("user", "assistant", *roles))
        return Scaffold(literals[2:], escaped[2:])

    def _extends(self, history: Roles, roles: Roles) -> bool:
        """Whether an assistant's message and then these leave everything written for ``history`` as it was.

        What the prompt said beyond the header of a message in history, an opened or an empty <think>, stays as the
        policy saw it, and so does white space at the end of that header.
        """
        before = self.scaffold(history).literals
        after, escaped = self.scaffold((*history, "assistant", *roles))
        n = len(history)
        return (
            before[:n] == after[:n]
            and (before[n].startswith(after[n]) or _header(before[n]) == _header(after[n]))
            and Scaffold(after[n + 1 :], escaped[n + 1 :]) == self.answer(roles)
        )

    def always_extends(self, roles: Roles) -> bool:
        """The same for the first two turns: what can be known before there is a conversation."""
        return self.extends(("user",), roles) and self.extends(("user", "assistant", *roles), roles)

    def keeps_thinking(self, roles: Roles) -> bool:
        """Whether the template itself still writes an assistant's thinking when messages of these roles follow."""
        said = "<think>\n\ue002\n</think>\n\n\ue003"
        chat = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": said}]
        return "\ue002" in self.write([*chat, *({"role": role, "content": "\ue001"} for role in roles)])


def escape(text: str) -> str:
    """Text as it stands inside a JSON string, the way chat templates write it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _header(literal: str) -> str:
    return _EMPTY_THINKING.sub("", literal).rstrip()
