"""Play rollouts without a model: from a script, or by a person at the prompt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from backtalk.capture.author import Left, Reply, Seen
from backtalk.capture.lines import read_action
from backtalk.errors import ConfigError, DataError
from backtalk.messages import Message


class Script:
    """An author that replies with its lines one after the other, and leaves after the last."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = iter(lines)

    async def reply(self, seen: Seen) -> Reply:
        line = next(self._lines, None)
        if line is None:
            raise Left("the script has no line left")
        return read_action(line, seen.tools)


def read_script(path: Path) -> list[str]:
    """Return the lines of a script that are actions: all but empty ones and those that begin with #.

    Raises:
        DataError: it cannot be read, or has none.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the script {path} cannot be read ({error}); write an action a line") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise DataError(f"the script {path} has no action; write one a line, for example: ls -la")
    return lines


class Person:
    """A person who is shown the environment's messages and asked for a line. Ctrl-D leaves.

    ``ask`` may block; it runs in a thread of its own, so that the environment's connections stay alive. A line that is
    no action is refused with ``warn``, and asked for again.
    """

    def __init__(self, ask: Callable[[], str], show: Callable[[Message], None], warn: Callable[[str], None]) -> None:
        self._ask, self._show, self._warn = ask, show, warn

    async def reply(self, seen: Seen) -> Reply:
        for message in seen.messages:
            self._show(message)
        while True:
            try:
                line = (await _in_thread(self._ask)).strip()
            except EOFError as error:
                raise Left("the person left") from error
            if not line:
                continue
            try:
                return read_action(line, seen.tools)
            except ConfigError as error:
                self._warn(str(error))


async def _in_thread(ask: Callable[[], str]) -> str:
    """Ask in a daemon thread: one of a pool would keep the process from ending while it waits for a line."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def settle(line: str, error: Exception | None) -> None:
        if not answer.done():
            answer.set_exception(error) if error is not None else answer.set_result(line)

    def work() -> None:
        line, failure = "", None
        try:
            line = ask()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, line, failure)

    threading.Thread(target=work, name="backtalk-prompt", daemon=True).start()
    return await answer
