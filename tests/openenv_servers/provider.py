"""A provider with OpenEnv's methods, whose containers are processes of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

SERVERS = Path(__file__).parent


class LocalProvider:
    """Runs ``uvicorn app:app`` in the folder that an image is named after."""

    running = 0

    def __init__(self, *, region: str) -> None:
        self.region, self.process = region, None

    def start_container(
        self, image: str, port: int | None = None, env_vars: dict[str, str] | None = None, **kwargs: Any
    ) -> str:
        if not (SERVERS / image).is_dir():
            raise RuntimeError(f"no image {image} in {self.region}")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "error"],
            cwd=SERVERS / image,
            env={**os.environ, **(env_vars or {})},
            stdout=subprocess.DEVNULL,
        )
        LocalProvider.running += 1
        return f"http://127.0.0.1:{port}/"

    def wait_for_ready(self, base_url: str, timeout_s: float = 30.0) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with suppress(OSError), opener.open(f"{base_url}health", timeout=2.0):
                return
            time.sleep(0.05)
        raise TimeoutError(f"{base_url} did not become ready")

    def stop_container(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            LocalProvider.running -= 1
