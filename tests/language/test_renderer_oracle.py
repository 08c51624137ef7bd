"""Against the PyPI package ``renderers``, which writes some families by hand: the same ids, the same bodies.

It differs from us in three ways, which are named where they show: a token over an edge is whose its first character
is, where ours is the template's, then the harness's; quotes that Llama's template sets around what tools say are body
there; and with thinking off, Qwen3's empty thinking is written into past turns too, as the policy met it.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.messages import Message, Part
from backtalk.trajectory import TokenRole
from families import ALL_NAMES, tokenizer_of

renderers = pytest.importorskip("renderers", reason="the oracle is the PyPI package renderers")

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
NAMES = [p for p in ALL_NAMES if p.values[0] in ("qwen3", "llama3_2", "real/qwen3", "real/llama3_2")]  # type: ignore[attr-defined]

WORDS = [
    "total",
    " 12",
    "\n",
    "a.txt",
    ")",
    " (x",
    "漢",
    "🙂",
    "\x1b[0m",
    '"q"',
    "\\n",
    "  ",
    ".",
    "\t",
    "\r\n",
    "\x00",
]
BODY = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
STRIPPED = BODY.map(lambda text: text.strip(" \n\r\t") or "ok")  # Llama's template trims what is not a tool's
TALK = st.tuples(
    STRIPPED, STRIPPED, st.lists(st.tuples(st.sampled_from(["I look.", "ls"]), BODY), min_size=1, max_size=3)
)


@cache
def ours(name: str, thinking: str) -> Renderer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Renderer(tokenizer_of(name), (), RendererConfig(thinking=thinking))  # type: ignore[arg-type]


@cache
def theirs(name: str, thinking: str) -> Any:
    from renderers.configs import Llama3RendererConfig, Qwen3RendererConfig
    from renderers.llama_3 import Llama3Renderer
    from renderers.qwen3 import Qwen3Renderer

    if "llama" in name:
        return Llama3Renderer(tokenizer_of(name), Llama3RendererConfig(date_string="26 Jul 2024"))
    return Qwen3Renderer(tokenizer_of(name), Qwen3RendererConfig(enable_thinking=thinking != "off"))


@pytest.mark.parametrize("thinking", ["off", "keep"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(talk=TALK)
def test_ids_and_bodies_are_theirs(name: str, thinking: str, talk: tuple[str, str, list[tuple[str, str]]]) -> None:
    r, oracle = ours(name, thinking), theirs(name, thinking)
    system, task, turns = talk
    prompt = [Message("system", (Part(system, CONTEXT),)), Message("user", (Part(task, CONTEXT),))]
    ids: list[int] = []
    roles: list[TokenRole] = []

    def add(segments: Any) -> None:
        for segment in segments:
            ids.extend(segment.token_ids)
            roles.extend([segment.role] * len(segment))

    add(r.render_prompt(prompt))
    chat = [{"role": "system", "content": system}, {"role": "user", "content": task}]
    bridged: list[int] = oracle.render_ids(chat, add_generation_prompt=True)
    assert ids == bridged
    for turn, (action, body) in enumerate(turns):
        sampled = r.encode_text(action)
        seen = r.render_observation([Message("tool", (Part(body, ENV),), "bash")], turn=turn, closed=True)
        # Qwen3's history has the policy's own ids and their bridge's extension, whatever thinking is set to.
        result = oracle.bridge_to_next_turn(bridged, list(sampled), [{"role": "tool", "content": body}])
        ids += sampled
        roles += [ACTION] * len(sampled)
        before = len(ids)
        add(seen)
        assert result is not None and result.token_ids == ids
        bridged = result.token_ids
        check_bodies(r, ids[before:], roles[before:], result.is_content[before:], body)
        chat += [{"role": "assistant", "content": action}, {"role": "tool", "content": body}]
    whole = oracle.render(chat, add_generation_prompt=True)
    assert whole.token_ids == ids
    theirs_env = [
        content and index >= 0 and whole.message_roles[index] == "tool"
        for content, index in zip(whole.is_content, whole.message_indices, strict=True)
    ]
    last = result.is_content[before:]
    assert theirs_env[before:] == last


def check_bodies(r: Renderer, ids: list[int], roles: list[TokenRole], content: list[bool], body: str) -> None:
    """Ours are theirs, but for the tokens that reach over an edge, and the quotes of Llama's template."""
    bodies = [position for position, is_body in enumerate(content) if is_body]
    for position, (token, role, is_body) in enumerate(zip(ids, roles, content, strict=True)):
        if (role is ENV) == is_body:
            continue
        text = r.encoder.decode([token])
        assert is_body and role is TEMPLATE and position in (bodies[0], bodies[-1]), (text, role, is_body)
        assert text.startswith('"') or text.endswith('"') or "\n" in text  # reaches into the scaffold at this edge
    if not body:
        assert ENV not in roles


@pytest.mark.parametrize("name", NAMES)
def test_where_the_rules_differ_ours_is_by_what_a_token_covers(name: str) -> None:
    """What they call body and we do not is exactly what covers scaffold too."""
    r, oracle = ours(name, "keep"), theirs(name, "keep")
    prompt = oracle.render_ids([{"role": "user", "content": "x"}], add_generation_prompt=True)
    action = list(r.encode_text("I look."))
    body = "a.txt (x)"
    result = oracle.bridge_to_next_turn(prompt, action, [{"role": "tool", "content": body}])
    seen = r.render_observation([Message("tool", (Part(body, ENV),))], turn=0, closed=True)
    mine = [segment.role is ENV for segment in seen for _ in segment.token_ids]
    their = result.is_content[-len(mine) :]
    text = "".join(r.encoder.decode(list(s.token_ids)) for s in seen if s.role is ENV)
    assert text in body
    extra = [t for t, a, b in zip(result.token_ids[-len(mine) :], their, mine, strict=True) if a and not b]
    assert all(r.encoder.decode([t]) not in body for t in extra)
