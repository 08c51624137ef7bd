"""Find out what a chat template writes around messages, by rendering placeholders in place of their texts.

A chat template is a Jinja program without a description. So nothing here lists model families: whether a template takes
system and tool messages, whether it escapes them, how it ends a turn, and whether it leaves a history unchanged when
messages are added are all found out by rendering conversations with it.
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

Roles = tuple[str, ...]  # the chat roles of a conversation, on which alone its scaffold depends

# Stands in for today's date in templates that print it, so that a run does not depend on the day it is started.
FIXED_DATE = date(2024, 7, 26)  # Llama 3's own default
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_CACHE_SIZE = 2048
_EMPTY_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")


class ChatTokenizer(Protocol):
    """The part of a transformers fast tokenizer that is used, beside its eos, bos and pad tokens if it has them."""

    @property
    def backend_tokenizer(self) -> Any: ...

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any: ...


class Scaffold(NamedTuple):
    """The text that a template writes around the bodies (texts) of n messages.

    ``literals`` are n + 1 texts: before the first body, between two, after the last. ``escaped`` are n flags: whether
    the template writes a body as inside a JSON string.
    """

    literals: tuple[str, ...]
    escaped: tuple[bool, ...]


def template_source(tokenizer: Any, control_ids: Mapping[str, int]) -> str:
    """Return the Jinja source of the tokenizer's default template; if it has none, warn and return Backtalk's own.

    Raises:
        RenderError: it has several templates and none is the default, or none and no token that could end a turn.
    """
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, Mapping):
        if "default" not in source:
            raise RenderError(
                f"the tokenizer has the chat templates {sorted(source)} and none is the default; "
                "set tokenizer.chat_template to the one to use"
            )
        source = source["default"]
    if not source:
        source = _default_template(control_ids, getattr(tokenizer, "eos_token", None))
        warnings.warn(f"the tokenizer has no chat template; Backtalk's own is used: {source}", stacklevel=3)
    return source


def _default_template(control_ids: Mapping[str, int], eos: str | None) -> str:
    """Return ChatML's template if the tokenizer has its tokens, else one of ``user:``, a line end, the text and eos."""
    if "<|im_start|>" in control_ids and "<|im_end|>" in control_ids:
        before, middle, after = "<|im_start|>", "\\n", "<|im_end|>\\n"
    elif eos in control_ids:
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


class ChatTemplate:
    """A chat template with one set of tools and options; answers are cached by the roles of the conversation."""

    def __init__(
        self, tokenizer: Any, source: str, schemas: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> None:
        self._tokenizer = tokenizer
        self._source = _TODAY.sub(lambda match: repr(FIXED_DATE.strftime(match[2])), source)
        self._schemas = list(schemas)
        self._options = dict(options)
        self.scaffold = lru_cache(_CACHE_SIZE)(self._scaffold)
        self.keeps_history = lru_cache(_CACHE_SIZE)(self._keeps_history)

    def render(self, conversation: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation in Hugging Face's format, with the generation prompt at its end.

        Raises:
            RenderError: the template raises.
        """
        try:
            return self._tokenizer.apply_chat_template(
                list(conversation),
                chat_template=self._source,
                tools=self._schemas or None,
                add_generation_prompt=True,
                tokenize=False,
                **self._options,
            )
        except Exception as error:  # templates are programs that may raise anything
            roles = [message["role"] for message in conversation]
            raise RenderError(f"the chat template cannot render a conversation of {roles}: {error}") from error

    def accepts(self, roles: Roles) -> bool:
        """Return whether a conversation of these roles has a scaffold."""
        try:
            self.scaffold(roles)
        except RenderError:
            return False
        return True

    def _scaffold(self, roles: Roles) -> Scaffold:
        """Return the scaffold of a conversation of these roles, the generation prompt included."""
        # Private-use characters at the edges, which templates do not trim; between them what JSON and HTML escape.
        bodies = [f'\ue000{number}\n"\\<&\ue001' for number in range(len(roles))]
        rest = self.render([{"role": role, "content": body} for role, body in zip(roles, bodies, strict=True)])
        literals: list[str] = []
        escaped: list[bool] = []
        for body, role in zip(bodies, roles, strict=True):
            before, found, after = rest.partition(body)
            escaped.append(not found)
            if not found:
                before, found, after = rest.partition(escape_json(body))
            if not found:
                raise RenderError(f"the chat template drops, rewrites or reorders a {role!r} message in {list(roles)}")
            literals.append(before)
            rest = after
        if any("\ue000" in literal or "\ue001" in literal for literal in (*literals, rest)):
            raise RenderError(f"the chat template writes a message of {list(roles)} twice")
        return Scaffold((*literals, rest), tuple(escaped))

    def observation_scaffold(self, roles: Roles) -> Scaffold:
        """Return the scaffold after an assistant's body when messages of these roles follow it."""
        literals, escaped = self.scaffold(("user", "assistant", *roles))
        return Scaffold(literals[2:], escaped[2:])

    def _keeps_history(self, history: Roles, roles: Roles) -> bool:
        """Return whether ``history`` stays as it was rendered when an assistant's message and then ``roles`` follow.

        Two differences are allowed, as the policy saw the first form: the generation prompt may end with an opened or
        empty <think>, and with white space, that the header of the finished message does not have.
        """
        before = self.scaffold(history).literals
        after, escaped = self.scaffold((*history, "assistant", *roles))
        n = len(history)
        return (
            before[:n] == after[:n]
            and (before[n].startswith(after[n]) or _header(before[n]) == _header(after[n]))
            and Scaffold(after[n + 1 :], escaped[n + 1 :]) == self.observation_scaffold(roles)
        )


def escape_json(text: str) -> str:
    """Return text as it is written inside a JSON string by chat templates (``tojson`` of transformers)."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _header(literal: str) -> str:
    """Return the header of an assistant's message without an opened or empty <think> and white space at its end."""
    return _EMPTY_THINKING.sub("", literal).rstrip()
