"""Runs a server's app on a socket that was handed over, and ends, with all it started, when its parent does.

Run as a script, by path: the parent's own modules are not on its way, only the app's folder is.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading


def _end_with(pipe: int) -> None:
    """The parent holds the other end of this pipe and never writes: it ends when the parent does, however that is."""
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)  # this process leads its group


def main(folder: str, app: str, listening: int) -> None:
    pipe = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    sys.path.insert(0, folder)
    import uvicorn

    # No pings from here: a trainer that is busy for long is no reason to end its episodes.
    config = uvicorn.Config(app, ws_ping_interval=None, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listening)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
