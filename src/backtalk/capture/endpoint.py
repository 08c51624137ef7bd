"""Ask a model behind an OpenAI-compatible API for actions.

There are two ways to ask. With messages (``/chat/completions``) the server renders the conversation itself, so the
reply was sampled from its tokens, not ours: its text is tokenised anew and cannot be trained as an action, unless the
server says which ids it was given and which it sampled, and they are ours. With tokens (``/completions``, as vLLM
serves it) our ids go in and sampled ids come out.

Logprobs are used only at temperature 1: servers differ on whether theirs are of before or after the temperature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backtalk.capture.rollout import Reply, Seen
from backtalk.errors import ConfigError, DataError, SamplerError
from backtalk.language.openai_chat import AssistantMessage, read_assistant, write_call
from backtalk.language.tool_formats.schemas import tool_schemas
from backtalk.messages import Message, clean_text
from backtalk.rollout.completions import Server, completion_request, sampled_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """Address of a model, and how it is asked."""

    url: str  # up to and with the version, http://127.0.0.1:8000/v1
    model: str
    tokens: bool = False  # ask with token ids, see above
    temperature: float = 1.0
    timeout_s: float = 300.0  # of one request
    attempts: int = 6  # at one request, while the server is busy, broken or away
    first_wait_s: float = 1.0  # before the second; doubled each time
    key_variable: str = "BACKTALK_API_KEY"  # the environment variable that holds the key, if the server wants one

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint {self.url!r} is no URL; write it as in http://127.0.0.1:8000/v1")
        if self.temperature < 0 or self.attempts < 1 or not self.timeout_s > 0 or self.first_wait_s < 0:
            raise ConfigError(
                f"temperature={self.temperature}, attempts={self.attempts}, timeout_s={self.timeout_s}, "
                f"first_wait_s={self.first_wait_s}: need >= 0, >= 1, > 0 and >= 0"
            )
        if self.tokens and self.temperature != 1:
            raise ConfigError(
                f"temperature={self.temperature} with token ids: whether a server's logprobs are of before or after "
                "the temperature cannot be told, and they are wanted for training; use 1, or leave --tokens out"
            )

    @property
    def server(self) -> Server:
        """Return the address, with the patience for it."""
        return Server(
            url=self.url,
            timeout_s=self.timeout_s,
            attempts=self.attempts,
            first_wait_s=self.first_wait_s,
            key_variable=self.key_variable,
        )


# What servers are asked beside the conversation, the first that is not refused: with ids and logprobs as vLLM and
# SGLang give them and nothing cutting the distribution, plainly, and under the names of OpenAI's later models.
def _chat_options(config: EndpointConfig, max_tokens: int) -> tuple[dict[str, Any], ...]:
    plain = {"temperature": config.temperature, "max_tokens": max_tokens}
    ids = {"return_token_ids": True, "logprobs": True, "top_logprobs": 0, "top_p": 1, "top_k": -1}
    return ({**plain, **ids}, plain, {"max_completion_tokens": max_tokens})


@dataclass(slots=True)
class Endpoint:
    """One episode's conversation with a server (an ``Author``)."""

    config: EndpointConfig
    messages: list[dict[str, Any]] = field(default_factory=list)
    call_id: str | None = None  # of the call that the next messages answer
    accepted: int = 0  # which of the chat options the server takes

    async def reply(self, seen: Seen) -> Reply:
        return await self._by_tokens(seen) if self.config.tokens else await self._by_messages(seen)

    async def _by_messages(self, seen: Seen) -> Reply:
        self.messages += _openai(seen.messages, self.call_id)
        asked: dict[str, Any] = {"model": self.config.model, "messages": self.messages}
        if seen.tools:
            asked["tools"] = tool_schemas(seen.tools)
        options = _chat_options(self.config, seen.max_tokens)
        while True:
            status, answer = await self._post("chat/completions", {**asked, **options[self.accepted]})
            if status == 200:
                break
            if status not in (400, 422) or self.accepted + 1 == len(options):
                raise self.config.server.refusal(status, answer, self.config.model)
            self.accepted += 1
        choice = self.config.server.first_choice(answer)
        reply = self._read(choice.get("message"))
        kept: dict[str, Any] = {"role": "assistant", "content": reply.text}
        call, self.call_id = next(iter(reply.calls), None), None
        if call is not None:
            self.call_id = reply.call_ids[0] or f"call_{len(self.messages)}"
            kept["tool_calls"] = [write_call(call, self.call_id)]
        self.messages.append(kept)
        sampled = None
        if self.config.temperature == 1:
            sampled = sampled_tokens(answer, choice, seen.token_ids, seen.stop_token_ids)
        return Reply(text=reply.text, call=call, sampled=sampled, cut=choice.get("finish_reason") == "length")

    def _read(self, message: Any) -> AssistantMessage:
        """Return a reply with its first call; one that cannot be read is text, so that the model is told about it."""
        fields: dict[str, Any] = dict(message) if isinstance(message, Mapping) else {}
        if isinstance(fields.get("tool_calls"), list):
            fields["tool_calls"] = fields["tool_calls"][:1]
        try:
            return read_assistant(fields)
        except DataError as error:
            raise SamplerError(f"{self.config.url} answered with what no policy of ours can say: {error}") from error

    async def _by_tokens(self, seen: Seen) -> Reply:
        asked = completion_request(
            self.config.model,
            seen.token_ids,
            max_tokens=seen.max_tokens,
            temperature=self.config.temperature,
            stop_token_ids=seen.stop_token_ids,
        )
        status, answer = await self._post("completions", asked)
        if status != 200:
            raise self.config.server.refusal(status, answer, self.config.model)
        choice = self.config.server.first_choice(answer)
        sampled = sampled_tokens(answer, choice, seen.token_ids, seen.stop_token_ids, own_prompt=True)
        if sampled is None:
            raise SamplerError(
                f"{self.config.url} gave back no token ids with logprobs that continue ours; a server has to know "
                "return_token_ids (vLLM does), and --tokenizer has to be its model's. Or leave --tokens out"
            )
        return Reply(sampled=sampled)

    async def _post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        async with self.config.server.client() as client:
            return await self.config.server.ask(client, path, body)


def _openai(messages: Sequence[Message], call_id: str | None) -> list[dict[str, Any]]:
    """Return messages in OpenAI's format: what answers a call as one message, what answers no call as the user's."""
    if any(message.role != "tool" for message in messages):
        return [{"role": m.role if m.role != "tool" else "user", "content": clean_text(m.text)} for m in messages]
    answered = {"role": "tool", "tool_call_id": call_id} if call_id else {"role": "user"}
    return [{**answered, "content": clean_text("\n".join(message.text for message in messages))}]
