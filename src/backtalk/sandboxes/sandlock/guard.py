"""The guard: a small trusted process that keeps one session of a sandlock sandbox. Run as a script, never imported.

Before the agent's first command it gives up its own rights: it takes another uid, a filter for system calls and
sockets, and a Landlock domain of the sandbox's folder and the machine's programs. sandlock then puts the session into a
narrower domain inside of that. So a mistake in the part of sandlock that opens files on behalf of the session reaches
no further than the folder.

Every process of a session descends from the guard, orphans too (it is their subreaper), so that all are found and
ended, whatever names, groups or sessions they took. They are ended too when the trainer's end of the requests closes.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import selectors
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_SET_DUMPABLE, _SET_SECCOMP, _DROP_FROM_BOUNDING_SET, _SET_SUBREAPER, _NO_NEW_PRIVILEGES = 4, 22, 24, 36, 38
_STOP_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 20.0


def main() -> None:
    """Run one session. Settings are JSON in the first argument; files 0, 1, 2 are the session's."""
    settings = json.loads(sys.argv[1])
    requests, answers = settings["requests"], settings["answers"]
    os.set_inheritable(requests, False)
    os.set_inheritable(answers, False)
    try:
        session = _begin(settings)
    except BaseException as error:
        os.write(answers, f"failed {type(error).__name__}: {error}"[:2000].encode() + b"\0")
        os._exit(1)
    os.write(answers, b"ready\0")
    for number in (0, 1, 2):
        os.close(number)
    threading.Thread(target=_report_end, args=(session, answers), daemon=True).start()
    _serve(requests, answers, session.pid)
    _kill_all(lambda _id, _tick: True, _END_TIMEOUT_S)
    os._exit(0)


def _begin(settings: dict[str, Any]) -> Any:
    sys.path.append(settings["packages"])
    import sandlock

    sandbox = sandlock.Sandbox(**settings["sandbox"])
    outer = sandlock.Sandbox(**settings["domain"])
    sandbox._ensure_native()  # loads the rest of the package while it can still be read
    _give_up_rights(settings["uid"], base64.b64decode(settings["filter"]))
    sandlock.confine(outer)
    return sandbox.popen(settings["command"])


def _give_up_rights(uid: int | None, rules: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if uid is not None:
        for capability in range(64):
            libc.prctl(_DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        libc.prctl(_SET_DUMPABLE, 1, 0, 0, 0)  # else sandlock may not take a file from its child
    libc.prctl(_SET_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    program = ctypes.create_string_buffer(rules, len(rules))
    header = struct.pack("@HP", len(rules) // 8, ctypes.addressof(program))
    if libc.prctl(_SET_SECCOMP, 2, header, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses the filter for system calls")


def _report_end(session: Any, answers: int) -> None:
    result = session.wait()
    code = 128 + result.signal if result.signal > 0 else result.exit_code
    os.write(answers, b"lost %d\0" % (code % 256))


def _serve(requests: int, answers: int, session_id: int) -> None:
    """Answer requests until the trainer closes them; wait for every dead child but the session's first process."""
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    partial = b""
    while True:
        if selector.select(0.2):
            if not (read := os.read(requests, 4096)):
                return
            *lines, partial = (partial + read).split(b"\n")
            for number, kind, *rest in map(bytes.split, lines):
                if kind == b"end":
                    ended = _kill_all(lambda _id, _tick: True, _END_TIMEOUT_S)
                else:
                    tick, shell_id = map(int, rest)
                    ended = _kill_all(_newer(tick, shell_id), _STOP_TIMEOUT_S)
                os.write(answers, number + (b" ok\0" if ended else b" failed\0"))
        for process_id in _children(os.getpid()):
            if process_id != session_id:
                with contextlib.suppress(OSError):
                    os.waitpid(process_id, os.WNOHANG)


def _newer(tick: int, shell_id: int) -> Callable[[int, int], bool]:
    """Return a test for the shell and for processes that began at this clock tick or later."""
    return lambda process_id, began: process_id == shell_id or began >= tick


def _kill_all(chosen: Callable[[int, int], bool], timeout_s: float) -> bool:
    """Kill the descendants that are `chosen` by id and start tick, until there are none; return whether that worked.

    All are stopped first, so that none can start another, and no shell reports the death of its child.
    """
    until_s = time.monotonic() + timeout_s
    while victims := [process_id for process_id, tick in _descendants() if chosen(process_id, tick)]:
        if time.monotonic() > until_s:
            return False
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process_id in victims:
                with contextlib.suppress(OSError):
                    os.kill(process_id, number)
        time.sleep(0.002)
    return True


def _descendants() -> list[tuple[int, int]]:
    """Return id and start tick of every living process below this one, nearest first."""
    found, waiting = [], _children(os.getpid())
    while waiting:
        process_id = waiting.pop(0)
        waiting += _children(process_id)
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{process_id}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found.append((process_id, int(fields[19])))
    return found


def _children(process_id: int) -> list[int]:
    """Return the ids of a process's children, of all its threads; none if it is gone."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process_id}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{process_id}/task/{thread}/children") as file:
                found += [int(word) for word in file.read().split()]
    return found


if __name__ == "__main__":
    main()
