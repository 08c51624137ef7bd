"""Where an OpenEnv server comes from: an address, a folder whose app is run here, a container of some provider."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import httpx2

from backtalk.envs.openenv.config import OpenEnvConfig
from backtalk.envs.openenv.session import OpenEnvError, is_loopback, missing, websocket_url
from backtalk.errors import ConfigError
from backtalk.settings import import_object

MAX_STARTS = 6  # of one folder's server in a run: one that keeps dying is broken
LOG_TAIL_CHARS = 2000
# Variables of this process that a folder's server gets: what programs need in order to run. Nothing that may hold a
# secret: no token or key, no proxy (its address may hold a password).
KEPT = frozenset(
    "CONDA_PREFIX HOME JAVA_HOME LANG LANGUAGE LD_LIBRARY_PATH LOGNAME PATH SHELL TMPDIR TZ USER VIRTUAL_ENV".split()
)
KEPT_PREFIXES = ("LC_", "PYTHON")
LOCAL_DOCKER = "openenv.core.containers.runtime.providers:LocalDockerProvider"


class Server(Protocol):
    """A place where OpenEnv sessions can be opened. ``start`` blocks; the others return at once."""

    @property
    def name(self) -> str: ...

    def start(self) -> str:
        """Its URL, once it answers; where it runs already, the same one.

        Raises:
            OpenEnvError: it cannot be had.
        """
        ...

    def last_words(self) -> str:
        """The end of its log as a clause for a message, where there is one."""
        ...

    def stop(self) -> None: ...


def server_for(where: str, config: OpenEnvConfig) -> Server:
    """The server that "openenv:WHERE" names: a URL, docker:IMAGE, or a folder.

    Raises:
        ConfigError: it names none, or a package is not there.
    """
    image = where.removeprefix("docker:")
    if where.startswith("docker:") or config.provider is not None:
        return ProvidedServer(image, config.provider or LOCAL_DOCKER, config)
    if "://" in where:
        websocket_url(where)
        return AddressedServer(where.rstrip("/"))
    if Path(where).is_dir():
        return LocalServer(Path(where).resolve(), config)
    raise ConfigError(
        f"openenv:{where} is no folder here; write openenv:./FOLDER of an environment, openenv:http://HOST:PORT of a "
        "running server, or openenv:docker:IMAGE"
    )


class AddressedServer:
    """Somebody else's server, used as it is."""

    def __init__(self, url: str) -> None:
        self.name = self._url = url

    def start(self) -> str:
        return self._url

    def last_words(self) -> str:
        return ""

    def stop(self) -> None:
        """It is not ours to stop."""


class LocalServer:
    """The app of an environment's folder, run by uvicorn in a process of its own on a loopback port."""

    def __init__(self, folder: Path, config: OpenEnvConfig) -> None:
        for package in ("uvicorn", "openenv"):
            if find_spec(package) is None:
                raise ConfigError(missing(package))
        self.name, self._folder, self._app, self._config = folder.name, folder, find_app(folder), config
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._starts = 0
        self._log = tempfile.NamedTemporaryFile(prefix="backtalk-openenv-", suffix=".log")  # noqa: SIM115

    def start(self) -> str:
        if self._process is not None and self._process.poll() is None:
            return self._url
        if self._starts == MAX_STARTS:
            raise OpenEnvError(f"the server of {self._folder} died {MAX_STARTS} times{self.last_words()}")
        self._starts += 1
        self._end()
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
            self._url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            launcher = str(Path(__file__).with_name("launch.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", launcher, str(self._folder), self._app, str(listening.fileno())],
                cwd=self._folder,
                env={**passed_environment(self._config.pass_env, KEPT, KEPT_PREFIXES), **self._config.env},
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(listening.fileno(),),
                start_new_session=True,
            )
        atexit.register(self.stop)
        self._wait(time.monotonic() + self._config.start_timeout_s)
        return self._url

    def last_words(self) -> str:
        self._log.flush()
        text = Path(self._log.name).read_text("utf-8", "replace")[-LOG_TAIL_CHARS:].strip()
        return f"; its log ended:\n{text}" if text else ""

    def stop(self) -> None:
        self._end()
        self._log.close()
        atexit.unregister(self.stop)

    def _wait(self, deadline: float) -> None:
        assert self._process is not None
        while self._process.poll() is None:
            with suppress(OpenEnvError):
                get_json(f"{self._url}/health", timeout_s=max(0.1, min(5.0, deadline - time.monotonic())))
                return
            if time.monotonic() > deadline:
                words = self.last_words()
                self._end()
                raise OpenEnvError(
                    f"the server of {self._folder} was not up within {self._config.start_timeout_s:g} s; give it more "
                    f"(start_timeout_s){words}"
                )
            time.sleep(0.05)
        raise OpenEnvError(
            f"the server of {self._folder} ({self._app}) ended at its start with exit code "
            f"{self._process.returncode}{self.last_words()}"
        )

    def _end(self) -> None:
        """Kill the server and everything in its process group; whatever it holds is an episode's."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None


class ProvidedServer:
    """A server that one of OpenEnv's providers starts: local Docker, or a cloud's sandbox."""

    def __init__(self, image: str, provider: str, config: OpenEnvConfig) -> None:
        self.name, self._image, self._config = image, image, config
        self._provider: Any = _made(provider, config.provider_options)
        self._url: str | None = None

    def start(self) -> str:
        if self._url is not None:
            return self._url
        variables = {**passed_environment(self._config.pass_env), **self._config.env}
        options = {"env_vars": variables} if variables else {}
        atexit.register(self.stop)  # a container that nobody stops costs money
        try:
            if hasattr(self._provider, "start_container"):
                url = self._provider.start_container(self._image, **options)
                self._provider.wait_for_ready(url, timeout_s=self._config.start_timeout_s)
            else:
                url = self._provider.start(**options)
                self._provider.wait_for_ready(timeout_s=self._config.start_timeout_s)
        except Exception as error:
            self.stop()
            raise OpenEnvError(f"{type(self._provider).__name__} could not start {self._image!r}: {error}") from error
        self._url = str(url).rstrip("/")
        return self._url

    def last_words(self) -> str:
        return ""

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._url = None
        for name in ("stop_container", "stop", "close"):
            if hasattr(self._provider, name):
                with suppress(Exception):  # what it was started for is over, and the next must be stopped too
                    getattr(self._provider, name)()


def find_app(folder: Path) -> str:
    """The ASGI app of an environment's folder, as ``openenv init`` lays it out.

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


def passed_environment(
    named: Iterable[str], kept: Set[str] = frozenset(), prefixes: tuple[str, ...] = ()
) -> dict[str, str]:
    """Return the variables of this process that a server is given: those named, those kept, those that begin so.

    Raises:
        ConfigError: a named one is not set here.
    """
    if missing := [name for name in named if name not in os.environ]:
        raise ConfigError(f"pass_env names {', '.join(missing)}, not set here; export it, or leave it out of pass_env")
    wanted = {*named, *kept}
    return {name: value for name, value in os.environ.items() if name in wanted or name.startswith(prefixes)}


def get_json(url: str, *, timeout_s: float, headers: Mapping[str, str] | None = None) -> Any:
    """What a server answers to a GET, which blocks.

    Raises:
        OpenEnvError: nobody answered, or not with JSON.
    """
    scheme, _, rest = url.partition("://")
    address = f"{scheme.replace('ws', 'http', 1)}://{rest}"
    sent = {name: os.path.expandvars(value) for name, value in (headers or {}).items()}
    try:
        # Of the environment, proxies are taken, but not for this machine's own servers.
        with httpx2.Client(timeout=timeout_s, follow_redirects=True, trust_env=not is_loopback(url)) as client:
            return client.get(address, headers=sent).raise_for_status().json()
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RecursionError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise OpenEnvError(f"no OpenEnv server answers at {address} ({first})") from error


def _made(provider: str, options: Mapping[str, Any]) -> Any:
    if provider.startswith("openenv.") and find_spec("openenv") is None:
        raise ConfigError(missing("openenv"))
    kind = import_object(provider, "provider")
    try:
        return kind(**options)
    except Exception as error:
        raise ConfigError(
            f"provider={provider!r} cannot be made ({error}); write module:Class of a class with OpenEnv's provider "
            "methods, and what it is made with as provider_options"
        ) from error
