"""Runs untrusted scenarios inside a sandbox: ``python -m backtalk.envs.awm.child``, started by ``isolation``.

A request is a line of JSON on standard input. Its response, with the same number, is JSON on file descriptor 9, and an
empty line on standard output marks it as complete. Output of the programs themselves is dropped.
"""

from __future__ import annotations

import asyncio
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from backtalk.envs.awm.files import Scenario
from backtalk.envs.awm.program import Program
from backtalk.envs.awm.session import LocalSession, Result
from backtalk.errors import BacktalkError

RESPONSES_FD = 9
MAX_PROGRAMS = 64  # kept executed; others are executed anew at the next rollout


def main() -> None:
    """Answer requests, one after another, until standard input ends."""
    responses = os.fdopen(RESPONSES_FD, "w", encoding="utf-8")
    requests, complete = (os.fdopen(os.dup(fd), mode, encoding="utf-8") for fd, mode in ((0, "r"), (1, "w")))
    os.set_inheritable(RESPONSES_FD, False)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sessions: dict[int, LocalSession] = {}
    with asyncio.Runner() as runner:
        for line in requests:
            request = json.loads(line)
            try:
                response = runner.run(_carry_out(sessions, request))
            except BacktalkError as error:
                response = {"failed": str(error)}
            except Exception as error:
                response = {"failed": f"{type(error).__name__}: {error}"}
            responses.write(json.dumps({"number": request["number"], **response}, default=repr))
            responses.flush()
            complete.write("\n")
            complete.flush()


async def _carry_out(sessions: dict[int, LocalSession], request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "hello":
            import fastapi  # noqa: F401
            import sqlalchemy  # noqa: F401

            return {}
        case "start":
            program = _program(request["file"])
            task = program.scenario.task(request["task_idx"])
            session = LocalSession(program, task, call_timeout_s=request["call_timeout_s"])
            sessions[request["session"]] = session
            tools = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in session.tools]
            return {"tools": tools, **_as_dict(await session.start())}
        case "call":
            return _as_dict(await sessions[request["session"]].call(request["tool"], request["arguments"]))
        case _:
            if session := sessions.pop(request["session"], None):
                session.release()
            return {}


@lru_cache(MAX_PROGRAMS)
def _program(file: str) -> Program:
    row = json.loads(Path(file).read_text("utf-8"))
    row |= {name: tuple(row[name]) for name in ("schema", "inserts", "tasks")}
    for mode, codes in row["verifiers"].items():  # JSON has no keys that are numbers
        row["verifiers"][mode] = {int(task_idx): code for task_idx, code in codes.items()}
    return Program(Scenario(**row))


def _as_dict(result: Result) -> dict[str, Any]:
    return {"observation": result.observation, "reward": result.reward, "done": result.done}


if __name__ == "__main__":
    main()
