"""Record the explorers' sessions in the real sandbox.

One JSON line a session: the messages with who said each stretch. No token appears yet, because the
tokenizer is trained on these very texts.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from backtalk.errors import InfrastructureError
from backtalk.messages import Message, Part, ToolCall
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.base import SandboxBackend
from backtalk.trajectory import TokenRole
from sessions import Session

log = logging.getLogger("record")

Turn = tuple[ToolCall, tuple[Message, ...]]


async def record(sessions: Iterable[Session], path: Path, config: TerminalConfig, *, concurrency: int = 16) -> int:
    """Run every session and append it to ``path``; return how many were recorded."""
    backend = local_sandbox()
    waiting = iter(sessions)
    count = 0
    with path.open("w", encoding="utf-8") as file:

        async def worker() -> None:
            nonlocal count
            for session in waiting:
                try:
                    line = json.dumps(await _run(session, backend, config))
                except InfrastructureError as error:
                    log.warning("%s: %s", session.task.id, error)
                    continue
                file.write(line + "\n")
                count += 1

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return count


async def _run(session: Session, backend: SandboxBackend, config: TerminalConfig) -> dict[str, Any]:
    async with open_terminal_env(session.task, backend, config) as env:
        prompt = await env.reset()
        turns = []
        for command in session.commands:
            call = ToolCall("bash", {"command": command})
            step = await env.step(call)
            turns.append({"call": ["bash", command], "messages": [_pack(message) for message in step.messages]})
        turns.append({"call": ["submit", session.answer], "messages": []})
    return {
        "id": session.task.id,
        "ordinary": session.ordinary,
        "right": session.right,
        "prompt": [_pack(message) for message in prompt],
        "turns": turns,
    }


def read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def unpack(message: dict[str, Any]) -> Message:
    parts = tuple(Part(text, TokenRole[role]) for text, role in message["parts"])
    return Message(message["role"], parts, message["tool"])


def unpack_call(call: list[str]) -> ToolCall:
    tool, argument = call
    return ToolCall(tool, {"command" if tool == "bash" else "answer": argument})


def _pack(message: Message) -> dict[str, Any]:
    return {
        "role": message.role,
        "tool": message.tool,
        "parts": [[part.text, part.role.name] for part in message.parts],
    }
