"""A vLLM server in a process of its own, started here and ended with this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from backtalk.engines.server.config import ServerConfig
from backtalk.errors import ConfigError, SamplerFault

TAIL = 1500  # characters of its log that an error shows
END_S = 10.0  # to end by itself


class VllmProcess:
    """vLLM, which serves one model at a free port of this machine."""

    def __init__(self, config: ServerConfig, location: str, dtype: str, device: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.base_url, self._log = f"http://127.0.0.1:{port}/v1", log
        python = config.python or sys.executable
        try:
            with log.open("wb") as file:
                self.process = subprocess.Popen(
                    vllm_command(python, location, dtype, device, port, config.arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},  # or it takes no weights
                    start_new_session=True,  # Ctrl-C is for us, who then end it
                )
        except OSError as error:
            raise ConfigError(
                f"engine.sampler.python={python!r} cannot be run ({error}); name the Python of an environment with vLLM"
            ) from error
        self.end = weakref.finalize(self, _end, self.process)

    def wait(self, timeout_s: float) -> None:
        """Return when it answers.

        Raises:
            SamplerFault: it ended, or did not answer in time.
        """
        until = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < until:
            try:
                with urlopen(f"{self.base_url.removesuffix('/v1')}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.5)
        self.check()
        self.end()
        raise SamplerFault(
            f"vLLM did not answer within engine.sampler.start_timeout_s={timeout_s:g} s; raise it, or see what it "
            f"waits for:\n{self._tail()}"
        )

    def check(self) -> None:
        """Raise SamplerFault if it has ended."""
        if (status := self.process.poll()) is None:
            return
        raise SamplerFault(
            f"vLLM ended with status {status}. If it is not installed, pip install vllm, or name the Python of an "
            "environment that has it as engine.sampler.python; memory and other options go into "
            f"engine.sampler.arguments. Continue with --resume. The end of its log:\n{self._tail()}"
        )

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-TAIL:].strip()


def vllm_command(python: str, location: str, dtype: str, device: str, port: int, arguments: Sequence[str]) -> list[str]:
    """Return the command that serves a model: of log-probabilities at the sampling temperature, at this machine alone.

    The model's own generation_config.json is left aside, since it would change the distribution. On a CPU prompts are
    not chunked: vLLM 0.32 ends there at a seeded request whose prompt is split over two steps, and all ours have seeds.
    ``arguments`` come last, so that they can turn it on again.
    """
    unchunked = ("--no-enable-chunked-prefill",) if device == "cpu" else ()
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", f"--model={location}", f"--dtype={dtype}"),
        *("--host=127.0.0.1", f"--port={port}", "--served-model-name=policy", "--generation-config=vllm"),
        *("--logprobs-mode=processed_logprobs", *unchunked, *arguments),
    ]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine that it started: first politely, then whatever is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
