"""Runs a stranger's scenarios inside a sandbox: ``python -m backtalk.envs.awm.child``, started by ``isolation``.

A request is a line of JSON on standard input. Its answer, with the same number, is JSON on descriptor 9, and an empty
line on standard output says that it is complete. What programs print themselves is dropped.
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
from backtalk.envs.awm.session import Answer, LocalSession
from backtalk.errors import BacktalkError

ANSWERS_FD = 9
MAX_PROGRAMS = 64  # kept; others are executed anew when they are asked for again


def main() -> None:
    """Answer requests, one after another, until standard input ends."""
    answers = os.fdopen(ANSWERS_FD, "w", encoding="utf-8")
    requests, complete = (os.fdopen(os.dup(fd), mode, encoding="utf-8") for fd, mode in ((0, "r"), (1, "w")))
    os.set_inheritable(ANSWERS_FD, False)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    episodes: dict[int, LocalSession] = {}
    with asyncio.Runner() as runner:
        for line in requests:
            request = json.loads(line)
            try:
                found = runner.run(_carry_out(episodes, request))
            except BacktalkError as error:
                found = {"failed": str(error)}
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps({"number": request["number"], **found}, default=repr))
            answers.flush()
            complete.write("\n")
            complete.flush()


async def _carry_out(episodes: dict[int, LocalSession], given: dict[str, Any]) -> dict[str, Any]:
    match given["do"]:
        case "hello":
            import fastapi
            import sqlalchemy

            return {"fastapi": fastapi.__version__, "sqlalchemy": sqlalchemy.__version__}
        case "start":
            program = _program(given["file"])
            contents = program.scenario.contents(given["task_idx"])
            session = LocalSession(program, contents, call_timeout_s=given["call_timeout_s"])
            episodes[given["episode"]] = session
            tools = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in session.tools]
            return {"tools": tools, **_packed(await session.start())}
        case "call":
            return _packed(await episodes[given["episode"]].call(given["tool"], given["arguments"]))
        case _:
            if session := episodes.pop(given["episode"], None):
                session.release()
            return {}


@lru_cache(MAX_PROGRAMS)
def _program(file: str) -> Program:
    row = json.loads(Path(file).read_text("utf-8"))
    row |= {name: tuple(row[name]) for name in ("schema", "inserts", "tasks")}
    for mode, codes in row["verifiers"].items():  # JSON has no keys that are numbers
        row["verifiers"][mode] = {int(task_idx): code for task_idx, code in codes.items()}
    return Program(Scenario(**row))


def _packed(answer: Answer) -> dict[str, Any]:
    return {"observation": answer.observation, "reward": answer.reward, "done": answer.done}


if __name__ == "__main__":
    main()
