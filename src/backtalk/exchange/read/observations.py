"""Find out who made each token between two actions, where a record has only token ids.

The renderer knows the scaffold of the chat template, so the ids are decoded, the scaffold is taken off, and what is
left is rendered again. The roles are taken over only where that gives exactly the ids that were there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Literal

from backtalk.errors import DataError, RenderError
from backtalk.exchange.read.speakers import looks_observed
from backtalk.exchange.read.wrappers import NO_WRAPPERS, Wrappers
from backtalk.language.renderer import Renderer
from backtalk.messages import Message, Part
from backtalk.trajectory import Segment, TokenRole

_GIVEN_ROLES = (TokenRole.CONTEXT, TokenRole.ENV_OUTPUT, TokenRole.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Rules by which a record is read, above all by which the tokens of an observation get their roles.

    ``renderer`` knows the scaffold. Where the scaffold cannot be found, all of an observation gets ``role``, template
    included; with None such a record is refused. Messages of chat role user after the first action get ``user_role``;
    with None they are what speakers.observed_users finds. With ``wrappers`` None those of the harness that wrote the
    record are taken, where it is known. ``on_drift`` "fork" begins a new branch where a prompt does not begin with what
    came before; "stop" refuses it. ``keep_reasoning`` writes a message's reasoning before its text, in <think> tags;
    without it, it is left out and counted, as most chat templates do with what is not the last turn. ``max_tokens``
    cuts a trajectory after the last whole turn that fits.

    Raises:
        ValueError: a role that an observation cannot have.
    """

    renderer: Renderer | None = None
    role: TokenRole | None = None
    user_role: TokenRole | None = None
    wrappers: Wrappers | None = None
    on_drift: Literal["stop", "fork"] = "stop"
    keep_reasoning: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, role in (("role", self.role), ("user_role", self.user_role)):
            if role is not None and role not in _GIVEN_ROLES:
                raise ValueError(f"{name}={role.name}: an observation is ENV_OUTPUT, WARNING or CONTEXT")

    def segments(
        self,
        ids: Sequence[int],
        *,
        turn: int,
        closed: bool,
        tools: Sequence[str | None] = (),
        commands: Sequence[str] = (),
        earlier: Sequence[str] = (),
        branch: int = 0,
    ) -> tuple[Segment, ...]:
        """Return the ids as segments.

        ``tools`` name each message's tool, ``commands`` are what the agent typed before it, ``earlier`` in other turns.

        Raises:
            DataError: the scaffold is not found and no ``role`` was given.
        """
        if not ids:
            return ()
        for candidate in self._candidates(ids, tools, commands, earlier):
            for end in (closed, not closed):  # some servers leave the stop token out of a completion
                found = self.render(candidate, turn=turn, closed=end, branch=branch)
                if found is not None and tuple(token for s in found for token in s.token_ids) == tuple(ids):
                    return found
        if self.role is None:
            raise DataError(self._unknown(ids, turn))
        return (Segment(self.role, tuple(ids), turn=turn, tool=_only(tools), branch=branch),)

    def render(
        self, messages: Sequence[Message], *, turn: int, closed: bool, branch: int = 0
    ) -> tuple[Segment, ...] | None:
        """Return an observation's messages as segments; None where the template cannot write them."""
        if self.renderer is None:
            return None
        try:
            segments = self.renderer.render_observation(messages, turn=turn, closed=closed)
        except RenderError:
            return None
        return tuple(replace(segment, branch=branch) for segment in segments)

    def message(
        self, role: str, text: str, tool: str | None, commands: Sequence[str] = (), earlier: Sequence[str] = ()
    ) -> Message:
        """Return an observation's message in parts with a role each."""
        user_role = self.user_role
        if user_role is None:
            user_role = TokenRole.ENV_OUTPUT if looks_observed(text) else TokenRole.CONTEXT
        if role == "tool" or user_role is TokenRole.ENV_OUTPUT:
            return Message(role, (self.wrappers or NO_WRAPPERS).split(text, commands, earlier), tool)
        return Message(role, (Part(text, user_role),), tool)

    def _candidates(
        self, ids: Sequence[int], tools: Sequence[str | None], commands: Sequence[str], earlier: Sequence[str]
    ) -> Iterator[list[Message]]:
        """Yield messages that these ids may be, by what the scaffold leaves of their text."""
        if self.renderer is None:
            return
        text = _decode(self.renderer, ids)
        for role in ("tool", "user"):
            before, between, after = _literals(self.renderer, role)
            for start in (before, before[1:]) if before else ():  # its first is the end of turn, one character
                if len(text) < len(start) + len(after) or not (text.startswith(start) and text.endswith(after)):
                    continue
                core = text[len(start) : len(text) - len(after)]
                split = core.split(between) if between else [core]
                for bodies in (split, [core], *filter(None, map(_from_json, (split, [core])))):
                    names = tools if len(tools) == len(bodies) else [_only(tools)] * len(bodies)
                    yield [self.message(role, b, t, commands, earlier) for b, t in zip(bodies, names, strict=True)]

    def _unknown(self, ids: Sequence[int], turn: int) -> str:
        if self.renderer is None:
            why = "without the model's tokenizer its template's tokens cannot be told from the world's; pass --model"
        else:
            text = self.renderer.encoder.decode(ids)
            why = f"this model's template does not write {text[:80]!r}; pass the --model that was sampled"
        return (
            f"the observation after turn {turn} ({len(ids)} tokens): {why}, or say that all of it, template included, "
            "is --observation-role env_output"
        )


DEFAULTS = Observations()


def _from_json(bodies: Sequence[str]) -> list[str] | None:
    """Return bodies that a template wrote as the inside of JSON strings, as Llama 3's does; None where it did not."""
    try:
        return [json.loads(f'"{body}"', strict=False) for body in bodies]
    except ValueError:
        return None


def _only(tools: Sequence[str | None]) -> str | None:
    return tools[0] if len(set(tools)) == 1 else None


@lru_cache(maxsize=64)
def _literals(renderer: Renderer, role: str) -> tuple[str, str, str]:
    """Return the template's text before, between and after bodies of a chat role, from the end of turn on.

    All three are empty where the template cannot write such messages.
    """
    texts = []
    for bodies in (["[body 1]"], ["[body 1]", "[body 2]"]):
        probes = [Message(role, (Part(body, TokenRole.ENV_OUTPUT),)) for body in bodies]
        try:
            segments = renderer.render_observation(probes, turn=0, closed=False)
        except RenderError:
            segments = ()
        texts.append(_decode(renderer, [token for segment in segments for token in segment.token_ids]))
    before, found, after = texts[0].partition("[body 1]")
    between = texts[1].partition("[body 1]")[2].partition("[body 2]")[0]
    return (before, between, after) if found else ("", "", "")


@lru_cache(maxsize=16)
def _control_tokens(renderer: Renderer) -> Mapping[int, str]:
    """Return a private-use character for each control token, so that its spelling in a text is not taken for it."""
    added = renderer.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    control = sorted(token for token, content in added.items() if str(content.content).replace("\u2581", " ").strip())
    return {token: chr(0xF0000 + number) for number, token in enumerate(control)}


def _decode(renderer: Renderer, ids: Sequence[int]) -> str:
    """Return the text of ids, a control token as its private-use character."""
    control = _control_tokens(renderer)
    return "".join(
        "".join(control[token] for token in run) if is_control else renderer.encoder.decode(list(run))
        for is_control, run in groupby(ids, key=control.__contains__)
    )
