"""Runs a server's app on a socket passed by the parent, and kills its process group when the parent ends.

Run by path, as a script, so that the app's folder is on the import path and the parent's modules are not.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading


def _end_with_parent(pipe: int) -> None:
    """Wait until the parent's end of the pipe closes, which it does however the parent ends; then kill the group."""
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)  # this process leads its group


def main(folder: str, app: str, listening: int) -> None:
    """Serve ``app`` ("module:app") from ``folder`` on the inherited socket with file descriptor ``listening``."""
    pipe = os.dup(0)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    sys.path.insert(0, folder)
    import uvicorn

    # No pings: a trainer that does not answer them for long is busy, not gone.
    config = uvicorn.Config(app, ws_ping_interval=None, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listening)])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
