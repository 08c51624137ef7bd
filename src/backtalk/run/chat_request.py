"""Read a request for a chat completion: what is served of OpenAI's protocol and vLLM's, and what is refused.

A reply is sampled as training samples it. Parameters that would sample it otherwise, or promise what nothing here
enforces, are refused by name; none is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from backtalk.errors import ConfigError
from backtalk.language.renderer import Renderer
from backtalk.messages import ParsedAction, ToolSpec
from backtalk.rollout.sampler import Completion, SamplingParams

T = TypeVar("T", int, float)

_WHOLE = "ask for one whole reply at a time"
_SAMPLED = "replies are sampled from the whole distribution, as in training"
_FORM = "the form of a reply is not enforced; ask for it in the messages, and check what comes"
_TEMPLATE = "the run's settings render the prompt; start the server with --set renderer.NAME=VALUE"

# What may be asked for beside messages, tools and limits: the values that change nothing, and why no other is served.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **{name: ((1,), _WHOLE) for name in ("n", "best_of")},
    **{name: ((False,), _WHOLE) for name in ("stream", "use_beam_search", "echo")},
    **{name: ((1,), _SAMPLED) for name in ("top_p", "typical_p", "repetition_penalty")},
    **{name: ((0,), _SAMPLED) for name in ("min_p", "frequency_penalty", "presence_penalty", "min_tokens")},
    **{name: (({}, [], False), _SAMPLED) for name in ("logit_bias", "bad_words", "stop_token_ids", "ignore_eos")},
    "top_k": ((0, -1), _SAMPLED),
    "top_logprobs": ((0,), "log-probabilities are told of the sampled tokens alone"),
    "tool_choice": (("auto", "none"), "no call can be forced, since replies are sampled as in training; use auto"),
    "response_format": (({"type": "text"},), _FORM),
    **{name: ((), _FORM) for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice")},
    **{name: ((), _FORM) for name in ("guided_grammar", "grammar", "json_schema", "regex")},
    "functions": (([],), "name them in tools"),
    "function_call": (("auto", "none"), "name functions in tools"),
    "add_generation_prompt": ((True,), _TEMPLATE),
    "continue_final_message": ((False,), _TEMPLATE),
    "chat_template": ((), _TEMPLATE),
    "chat_template_kwargs": (({},), _TEMPLATE),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one chat completion. ``max_tokens`` is of the reply, which ends before the first of ``stop``."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[ToolSpec, ...]
    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    may_call: bool = True
    max_calls: int | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any], defaults: SamplingParams) -> Request:
        """Read the body of a request; a field that is null is taken as not there.

        Raises:
            ConfigError: it asks for what cannot be served, or is no request.
        """
        body = {name: value for name, value in body.items() if value is not None}
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise ConfigError("messages has to be a list of at least one message")
        if messages[-1].get("role") == "assistant":
            raise ConfigError("the last message is the assistant's; a reply follows one of the user or of a tool")
        for name, (served, reason) in _REFUSED.items():
            if name in body and body[name] not in served:
                raise ConfigError(f"{name}={body[name]!r} is not served: {reason}")
        limit = _number(body, "max_completion_tokens", int, _number(body, "max_tokens", int, defaults.max_tokens))
        if limit < 1:
            raise ConfigError(f"max_tokens={limit} leaves no room for a reply; ask for at least 1")
        temperature = _number(body, "temperature", float, defaults.temperature)
        params = replace(defaults, temperature=temperature, seed=_number(body, "seed", int, defaults.seed))
        tools = body.get("tools", [])
        if not isinstance(tools, list):
            raise ConfigError(f"tools has to be a list, got {type(tools).__name__}")
        return cls(
            tuple(messages),
            tuple(_read_tool(tool) for tool in tools),
            params,
            min(limit, defaults.max_tokens),
            _read_stop(body.get("stop", [])),
            may_call=bool(tools) and body.get("tool_choice") != "none",
            max_calls=1 if body.get("parallel_tool_calls") is False else None,
        )


def _number(body: Mapping[str, Any], name: str, kind: Callable[[Any], T], default: T) -> T:
    try:
        number = kind(body.get(name, default))
        if math.isfinite(number):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name}={body[name]!r} is no number; leave it out for {default}")


def _read_stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop={stop!r} is neither a text nor a list of texts, none of them empty")
    return tuple(texts)


def _read_tool(tool: Any) -> ToolSpec:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f"tool {tool!r} is none of type function with a name")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return ToolSpec(function["name"], function.get("description") or "", parameters)


def stop_reply(completion: Completion, stop: Sequence[str], renderer: Renderer) -> tuple[Completion, ParsedAction]:
    """Return a completion up to the token that completes a text of ``stop``, and what it says before that text.

    It is as if sampling had ended there, which changes nothing about the tokens before.
    """
    ids = completion.token_ids
    if any(text in renderer.encoder.decode(ids) for text in stop):
        for end in range(1, len(ids) + 1):
            said = renderer.encoder.decode(ids[:end])
            if found := [said.index(text) for text in stop if text in said]:
                logprobs = completion.logprobs and completion.logprobs[:end]
                action = renderer.parse_action(renderer.encode_text(said[: min(found)]), True)
                return Completion(ids[:end], logprobs, stopped=True), action
    return completion, renderer.parse_action(ids, completion.stopped)
