"""Provides OpenEnv servers: at a URL, started from an environment's folder, or in a container of some provider."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2

from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.session import OpenEnvError, expand_headers, is_loopback, missing_package, websocket_url
from backtalk.errors import ConfigError
from backtalk.settings import import_object

MAX_STARTS = 6  # of one folder's server in a run: one that dies more often is broken
LOG_TAIL_CHARS = 2000
# Variables of this process that a folder's server gets, because programs need them to run. None may hold a secret: no
# token or key, no proxy (whose address may hold a password).
PASSED_VARIABLES = frozenset(
    "CONDA_PREFIX HOME JAVA_HOME LANG LANGUAGE LD_LIBRARY_PATH LOGNAME PATH SHELL TMPDIR TZ USER VIRTUAL_ENV".split()
)
PASSED_PREFIXES = ("LC_", "PYTHON")
LOCAL_DOCKER = "openenv.core.containers.runtime.providers:LocalDockerProvider"


class Server:
    """A server that already runs at a URL; subclasses start their own. Only ``start`` blocks."""

    def __init__(self, name: str, url: str = "") -> None:
        self.name, self._url = name, url

    def start(self) -> str:
        """Return the URL once the server answers; does nothing where it runs already.

        Raises:
            OpenEnvError: it cannot be started.
        """
        return self._url

    def log_tail(self) -> str:
        """Return the end of its log as a clause for an error message; empty where there is none."""
        return ""

    def stop(self) -> None:
        """Stop the server if it was started here."""


def find_server(location: str, config: OpenEnvConfig) -> Server:
    """Return the server that "openenv:WHERE" names: a URL, docker:IMAGE, or a folder.

    Raises:
        ConfigError: it names none, or a package is not installed.
    """
    if location.startswith("docker:") or config.provider is not None:
        return ProviderServer(location.removeprefix("docker:"), config)
    if "://" in location:
        websocket_url(location)
        return Server(location.rstrip("/"), location.rstrip("/"))
    if Path(location).is_dir():
        return LocalServer(Path(location).resolve(), config)
    raise ConfigError(
        f"openenv:{location} is no folder here; write openenv:./FOLDER of an environment, openenv:http://HOST:PORT of "
        "a running server, or openenv:docker:IMAGE"
    )


class LocalServer(Server):
    """The app of an environment's folder, run by uvicorn in a process of its own on a loopback port."""

    def __init__(self, folder: Path, config: OpenEnvConfig) -> None:
        super().__init__(folder.name)
        for package in ("uvicorn", "openenv"):
            if find_spec(package) is None:
                raise ConfigError(missing_package(package))
        self._folder, self._app, self._config = folder, find_app(folder), config
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._log = tempfile.NamedTemporaryFile(prefix="backtalk-openenv-", suffix=".log")  # noqa: SIM115

    def start(self) -> str:
        if self._process is not None and self._process.poll() is None:
            return self._url
        if self._starts == MAX_STARTS:
            raise OpenEnvError(f"the server of {self._folder} died {MAX_STARTS} times{self.log_tail()}")
        self._starts += 1
        self._kill()
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
            self._url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            launcher = str(Path(__file__).with_name("launch.py"))
            shared = (name for name in os.environ if name in PASSED_VARIABLES or name.startswith(PASSED_PREFIXES))
            variables = {name: os.environ[name] for name in shared}
            self._process = subprocess.Popen(
                [sys.executable, "-P", launcher, str(self._folder), self._app, str(listening.fileno())],
                cwd=self._folder,
                env={**variables, **_passed_variables(self._config)},
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(listening.fileno(),),
                start_new_session=True,
            )
        atexit.register(self.stop)
        self._wait(self._process, time.monotonic() + self._config.start_timeout_s)
        return self._url

    def log_tail(self) -> str:
        self._log.flush()
        text = Path(self._log.name).read_text("utf-8", "replace")[-LOG_TAIL_CHARS:].strip()
        return f"; its log ended:\n{text}" if text else ""

    def stop(self) -> None:
        self._kill()
        self._log.close()
        atexit.unregister(self.stop)

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        while process.poll() is None:
            with suppress(OpenEnvError):
                get_json(f"{self._url}/health", timeout_s=max(0.1, min(5.0, deadline - time.monotonic())))
                return
            if time.monotonic() > deadline:
                log_tail = self.log_tail()
                self._kill()
                raise OpenEnvError(
                    f"the server of {self._folder} was not up within {self._config.start_timeout_s:g} s; give it more "
                    f"(start_timeout_s){log_tail}"
                )
            time.sleep(0.05)
        raise OpenEnvError(
            f"the server of {self._folder} ({self._app}) ended at its start with exit code "
            f"{process.returncode}{self.log_tail()}"
        )

    def _kill(self) -> None:
        """Kill the server and everything in its process group, without grace: it holds nothing but rollouts."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None


class ProviderServer(Server):
    """A server that one of OpenEnv's providers starts: local Docker, or a cloud's sandbox."""

    def __init__(self, image: str, config: OpenEnvConfig) -> None:
        super().__init__(image)
        self._config = config
        path = config.provider or LOCAL_DOCKER
        if path.startswith("openenv.") and find_spec("openenv") is None:
            raise ConfigError(missing_package("openenv"))
        provider_class = import_object(path, "provider")
        try:
            self._provider: Any = provider_class(**config.provider_options)
        except Exception as error:
            raise ConfigError(
                f"provider={path!r} cannot be made ({error}); write module:Class of a class with OpenEnv's provider "
                "methods, and what it is made with as provider_options"
            ) from error

    def start(self) -> str:
        if self._url:
            return self._url
        variables, timeout_s = _passed_variables(self._config), self._config.start_timeout_s
        options = {"env_vars": variables} if variables else {}
        atexit.register(self.stop)  # a container left running costs money
        try:
            if hasattr(self._provider, "start_container"):
                url = self._provider.start_container(self.name, **options)
                self._provider.wait_for_ready(url, timeout_s=timeout_s)
            else:
                url = self._provider.start(**options)
                self._provider.wait_for_ready(timeout_s=timeout_s)
        except Exception as error:
            self.stop()
            raise OpenEnvError(f"{type(self._provider).__name__} could not start {self.name!r}: {error}") from error
        self._url = str(url).rstrip("/")
        return self._url

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._url = ""
        for name in ("stop_container", "stop", "close"):
            if hasattr(self._provider, name):
                with suppress(Exception):  # a failure here must not keep the next from being stopped
                    getattr(self._provider, name)()


def find_app(folder: Path) -> str:
    """Return the ASGI app ("module:app") of an environment's folder, as ``openenv init`` lays it out.

    Raises:
        ConfigError: there is none.
    """
    import yaml

    with suppress(FileNotFoundError, yaml.YAMLError):
        manifest = yaml.safe_load((folder / "openenv.yaml").read_text("utf-8"))
        if isinstance(manifest, dict) and isinstance(manifest.get("app"), str):
            return manifest["app"]
    for path, app in (("server/app.py", "server.app:app"), ("app.py", "app:app")):
        if (folder / path).is_file():
            return app
    raise ConfigError(
        f"{folder} is no OpenEnv environment: it has neither an openenv.yaml that names its app nor server/app.py; "
        "make one with: openenv init NAME"
    )


def _passed_variables(config: OpenEnvConfig) -> dict[str, str]:
    """Return the variables that ``pass_env`` names and those of ``env``."""
    if missing := [name for name in config.pass_env if name not in os.environ]:
        raise ConfigError(f"pass_env names {', '.join(missing)}, not set here; export it, or leave it out of pass_env")
    return {**{name: os.environ[name] for name in config.pass_env}, **config.env}


def get_json(url: str, *, timeout_s: float, headers: Mapping[str, str] | None = None) -> Any:
    """Return a server's JSON answer to a GET request; blocks.

    Raises:
        OpenEnvError: no server answered, or not with JSON.
    """
    scheme, _, rest = url.partition("://")
    address = f"{scheme.replace('ws', 'http', 1)}://{rest}"
    try:
        # A proxy of the environment variables is used, but not to reach this machine's own servers.
        with httpx2.Client(timeout=timeout_s, follow_redirects=True, trust_env=not is_loopback(url)) as client:
            return client.get(address, headers=expand_headers(headers)).raise_for_status().json()
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RecursionError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise OpenEnvError(f"no OpenEnv server answers at {address} ({first})") from error
