"""An OpenAI-compatible endpoint over our sampler, for agents that other people wrote.

Token in, token out: what a conversation's replies were sampled as is remembered, so that a conversation that comes back
is continued from the very ids. It is known by what it means, not by its bytes: agents write JSON anew and add fields.
Replies that are not known are rendered with their calls in the policy's tool format. Either way a prompt is, token for
token, what training would have rendered (``History``). Each reply carries its prompt's ids, its own and their
log-probabilities, under the names that vLLM gives them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from backtalk.errors import BacktalkError, ConfigError
from backtalk.language.history import History
from backtalk.language.openai_chat import AssistantMessage, content_text, read_assistant, write_call
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, ParsedAction, Part, ToolSpec, clean_text
from backtalk.rollout.sampler import Completion, Sampler, SamplingParams
from backtalk.trajectory import TokenRole

if TYPE_CHECKING:
    from starlette.applications import Starlette

REMEMBERED = 4096  # conversations


class ContextTooLong(ConfigError):
    """A history that leaves no room for a reply. Agents look for the code that OpenAI gives it, and summarise."""


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion as it was asked for."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[ToolSpec, ...]
    params: SamplingParams
    max_tokens: int  # of the reply

    @classmethod
    def of(cls, body: Mapping[str, Any], defaults: SamplingParams) -> Request:
        """Raises ConfigError: what cannot be served, or is no request."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
            raise ConfigError("messages has to be a list of at least one message")
        if messages[-1].get("role") == "assistant":
            raise ConfigError("the last message is the assistant's; a reply follows one of the user or of a tool")
        if body.get("stream") or body.get("n", 1) != 1:
            raise ConfigError("stream=true and n > 1 are not served; ask for one whole reply at a time")
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or defaults.max_tokens
        temperature, seed = body.get("temperature"), body.get("seed")
        params = SamplingParams(
            temperature=defaults.temperature if temperature is None else float(temperature),
            max_tokens=defaults.max_tokens,
            seed=defaults.seed if seed is None else int(seed),
        )
        tools = tuple(_tool(tool) for tool in body.get("tools") or ())
        return cls(tuple(messages), tools, params, min(int(limit), defaults.max_tokens))


class Endpoint:
    """Chat completions from one policy. ``sampler_of`` makes its sampler for some parameters."""

    def __init__(
        self,
        renderer: Renderer,
        sampler_of: Callable[[SamplingParams], Sampler],
        defaults: SamplingParams,
        *,
        max_tokens: int,
        name: str = "backtalk",
    ) -> None:
        """``max_tokens`` is of a whole history, reply included."""
        self.name = name
        self._renderer, self._sampler_of, self._defaults, self._max_tokens = renderer, sampler_of, defaults, max_tokens
        self._samplers: dict[SamplingParams, Sampler] = {}
        self._known: OrderedDict[str, History] = OrderedDict()  # up to and with a reply
        self._numbers, self._salt = count(), token_hex(4)  # so that no call has the id of one before a restart

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request, as plain data.

        Raises:
            ConfigError: what was asked for cannot be served; a history that leaves no room for a reply.
        """
        request = Request.of(body, self._defaults)
        renderer = self._renderer.for_tools(request.tools)
        said = Conversation.of(request)
        history = self._history(said, renderer)
        prompt = tuple(history.token_ids)
        room = self._max_tokens - len(prompt)
        if room < 1:
            raise ContextTooLong(
                f"this model's maximum context length is {self._max_tokens} tokens, and the history has {len(prompt)}"
            )
        number = next(self._numbers)
        async with self._sampler(request.params).session(f"serve/{number}") as session:
            completion = await session.sample(prompt, min(room, request.max_tokens))
        action = renderer.parse_action(completion.token_ids, completion.stopped)
        message = _message(action, bool(request.tools), f"{self._salt}{number}")
        history.act(completion.token_ids)
        self._remember(said.keys_with(message), history)
        return self._answer(number, request, prompt, completion, message, renderer)

    def _sampler(self, params: SamplingParams) -> Sampler:
        if params not in self._samplers:
            self._samplers[params] = self._sampler_of(params)
        return self._samplers[params]

    def _history(self, said: Conversation, renderer: Renderer) -> History:
        """The conversation as training would have rendered it, from the last reply on that is remembered."""
        history, start = History(), 0
        for turn in range(len(said.turns), 0, -1):
            known = next((self._known[key] for key in said.keys[turn - 1] if key in self._known), None)
            if known is not None:
                history, start = known.copy(), turn
                history.observe(said.turns[turn - 1].answers, renderer)
                break
        else:
            if said.prompt:
                history.begin(said.prompt, renderer)
        for turn in said.turns[start:]:
            history.act(renderer.encode_message(turn.reply.text, turn.reply.calls, turn.reply.reasoning))
            history.observe(turn.answers, renderer)
        return history

    def _remember(self, keys: Sequence[str], history: History) -> None:
        for key in keys:
            self._known[key] = history
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _answer(
        self,
        number: int,
        request: Request,
        prompt: tuple[int, ...],
        completion: Completion,
        message: Mapping[str, Any],
        renderer: Renderer,
    ) -> dict[str, Any]:
        decode = renderer.encoder.decode
        logprobs = completion.logprobs and [
            {"token": decode([token]), "logprob": value, "bytes": None, "top_logprobs": []}
            for token, value in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        ending = "tool_calls" if "tool_calls" in message else "stop" if completion.stopped else "length"
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": ending,
            "logprobs": None if logprobs is None else {"content": list(logprobs)},
            "token_ids": list(completion.token_ids),
        }
        used = {"prompt_tokens": len(prompt), "completion_tokens": len(completion.token_ids)}
        return {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "prompt_token_ids": list(prompt),
            "choices": [choice],
            "usage": used | {"total_tokens": sum(used.values())},
        }


def application(endpoint: Endpoint) -> Starlette:
    """The routes /v1/chat/completions, /v1/models and /health."""
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def complete(request: HttpRequest) -> JSONResponse:
        try:
            body = json.loads(await request.body())
            if not isinstance(body, dict):
                raise ConfigError("the body has to be a JSON object")
            return JSONResponse(await endpoint.complete(body))
        except (BacktalkError, ValueError, TypeError) as error:
            code = "context_length_exceeded" if isinstance(error, ContextTooLong) else "invalid_request"
            said = {"message": str(error), "type": "invalid_request_error", "code": code}
            return JSONResponse({"error": said}, status_code=400)

    async def models(request: HttpRequest) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": endpoint.name, "object": "model"}]})

    async def health(request: HttpRequest) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    routes = [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Starlette(routes=routes)


async def serve(endpoint: Endpoint, *, host: str, port: int) -> None:
    """Until it is cancelled.

    Raises:
        ConfigError: the packages for it are not installed.
        OSError: the address is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError("serving needs uvicorn and starlette; type: pip install 'backtalk[serve]'") from error

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # the caller has handlers of its own
            yield

    server = Server(uvicorn.Config(application(endpoint), host=host, port=port, log_level="warning"))
    serving = asyncio.ensure_future(server.serve())
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise


# ---------------------------------------------------------------- messages of the protocol, and ours


def _tool(tool: Mapping[str, Any]) -> ToolSpec:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f"tool {tool!r} is none of type function with a name")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return ToolSpec(function["name"], function.get("description") or "", parameters)


@dataclass(frozen=True, slots=True)
class Turn:
    """A reply, and the messages that answer it."""

    reply: AssistantMessage
    answers: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """A history in turns. ``keys`` are what it is remembered by up to each reply: with the calls' ids, and without.

    The same call may have been sampled in many ways; its id tells which. Where an agent has changed the ids, the last
    reply of that meaning is taken.
    """

    prompt: tuple[Message, ...]
    turns: tuple[Turn, ...]
    keys: tuple[tuple[str, str], ...]
    end: tuple[str, str]  # the keys of all of it

    @classmethod
    def of(cls, request: Request) -> Conversation:
        """Raises ConfigError, or DataError: a message that cannot be served."""
        prompt: list[Message] = []
        turns: list[Turn] = []
        for message in request.messages:
            if message.get("role") == "assistant":
                reply = read_assistant(message)
                if turns and not turns[-1].answers:  # some agents send text and calls of a reply one after the other
                    reply = _joined(turns.pop().reply, reply)
                turns.append(Turn(reply))
            elif turns:
                turns[-1] = replace(turns[-1], answers=(*turns[-1].answers, _said(message)))
            else:
                prompt.append(_said(message))
        tools = [[tool.name, tool.description, tool.parameters] for tool in request.tools]
        end, keys = _after(("", ""), [tools, _meaning(prompt)]), []
        for turn in turns:
            keys.append(end := _after(end, *_reply_meaning(turn.reply)))
            end = _after(end, _meaning(turn.answers))
        return cls(tuple(prompt), tuple(turns), tuple(keys), end)

    def keys_with(self, reply: Mapping[str, Any]) -> tuple[str, str]:
        """What this conversation with a reply after it is known by."""
        return _after(self.end, *_reply_meaning(read_assistant(reply)))


def _after(keys: tuple[str, str], meaning: Any, ids: Any = None) -> tuple[str, str]:
    """Return the keys of what went before and then this: one with the calls' ids, one without."""
    exact, loose = (
        sha256(f"{key}{json.dumps(told, sort_keys=True)}".encode()).hexdigest()
        for key, told in zip(keys, ([meaning, ids], meaning), strict=True)
    )
    return exact, loose


def _meaning(messages: Sequence[Message]) -> list[list[str]]:
    return [[message.role, message.text] for message in messages]


def _reply_meaning(reply: AssistantMessage) -> tuple[Any, Any]:
    """Return what a reply says, whichever way it is written, and the ids of its calls."""
    calls = [[call.tool, _same_numbers(call.arguments)] for call in reply.calls]
    return [reply.text.strip(), calls], list(reply.call_ids)


def _same_numbers(value: Any) -> Any:
    """Return a JSON value in which 1.0 is 1, as JavaScript writes it."""
    if isinstance(value, Mapping):
        return {key: _same_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_same_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _joined(first: AssistantMessage, second: AssistantMessage) -> AssistantMessage:
    return AssistantMessage(
        text="\n".join(filter(None, (first.text, second.text))),
        calls=first.calls + second.calls,
        call_ids=first.call_ids + second.call_ids,
        reasoning="\n".join(filter(None, (first.reasoning, second.reasoning))),
    )


def _said(message: Mapping[str, Any]) -> Message:
    role = {"developer": "system", "function": "tool"}.get(str(message.get("role")), str(message.get("role")))
    if role not in ("system", "user", "tool"):
        raise ConfigError(f"message role {message.get('role')!r} is not known; use system, user, assistant or tool")
    text = clean_text(content_text(message.get("content")))
    return Message(role, (Part(text, TokenRole.ENV_OUTPUT),), tool=message.get("name"))


def _message(action: ParsedAction, may_call: bool, name: str) -> dict[str, Any]:
    """The reply as the protocol has it; a call that cannot be read stays text. ``name`` is no other reply's."""
    if not may_call or not action.calls:
        return {"role": "assistant", "content": action.text}
    calls = [write_call(call, f"call_{name}_{position}") for position, call in enumerate(action.calls)]
    return {"role": "assistant", "content": None, "tool_calls": calls}
