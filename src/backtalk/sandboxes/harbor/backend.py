"""Sandbox backend over Harbor's environments: docker, podman, daytona, e2b, modal, or one by import path."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backtalk.errors import ConfigError, SandboxError, SandboxUnavailable
from backtalk.sandboxes.base import BackendReport, SandboxLimits
from backtalk.sandboxes.harbor.session import HarborSandbox, describe

if TYPE_CHECKING:
    from harbor.environments.base import BaseEnvironment  # pyright: ignore[reportMissingImports]

IMAGE = "python:3.11-slim-bookworm"  # has bash, coreutils, tar and python3, on which the packaged tasks rely


class HarborBackend:
    """A sandbox backend whose sandboxes are environments of Harbor.

    Raises:
        SandboxUnavailable: Harbor is not installed, or the provider says that it cannot run here.
        ConfigError: Harbor has no such environment.
    """

    def __init__(
        self, environment: str = "docker", *, image: str = IMAGE, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Choose the environment and run its preflight check.

        ``environment`` is a type of Harbor's or "module:Class"; ``kwargs`` go to its constructor (Harbor's --ek).
        ``image`` is the container image that a sandbox starts from, with bash, coreutils and tar in it.
        """
        self._environment, self._image, self._kwargs = environment, image, dict(kwargs or {})
        config = _trial_config(environment, self._kwargs)
        from harbor.environments.factory import EnvironmentFactory  # pyright: ignore[reportMissingImports]

        try:
            EnvironmentFactory.run_preflight(config.type, config.import_path)
        except (SystemExit, ImportError, ValueError, OSError) as error:
            raise SandboxUnavailable(f"Harbor's environment {environment!r} cannot run here: {error}") from error

    @property
    def report(self) -> BackendReport:
        """Return the isolation and limits asked of Harbor's provider; whether it enforces them depends on it."""
        return BackendReport(
            name=f"harbor:{self._environment}",
            isolation={
                "network": "none: Harbor's no-network policy, which the provider enforces or refuses",
                "files": f"the image {self._image}",
                "processes": "as the provider isolates them; the namespace is kept over a restart",
                "user": "the image's own",
            },
            limits={
                "memory": "the provider's",
                "processes": "rlimit; none for root",
                "disk": "size of one file by rlimit; else the provider's",
                "output": "cut inside",
            },
            warnings=("each command runs in a shell of its own: folder, variables and functions are carried over",),
        )

    @asynccontextmanager
    async def open(self, limits: SandboxLimits) -> AsyncGenerator[HarborSandbox]:
        from harbor.models.task.config import EnvironmentConfig  # pyright: ignore[reportMissingImports]

        with tempfile.TemporaryDirectory(prefix="backtalk-harbor-", ignore_cleanup_errors=True) as folder:
            definition = Path(folder, "environment")
            definition.mkdir()
            config = EnvironmentConfig(
                docker_image=self._image,
                memory_mb=limits.memory_mb,
                network_mode="no-network",
                workdir="/",
            )
            async with start_environment(
                self._environment, self._kwargs, definition, "backtalk", config, Path(folder)
            ) as inner:
                sandbox = HarborSandbox(inner, limits)
                await sandbox.start()
                yield sandbox


def _trial_config(environment: str, kwargs: Mapping[str, Any]) -> Any:
    try:
        from harbor.models.environment_type import EnvironmentType  # pyright: ignore[reportMissingImports]
        from harbor.models.trial.config import EnvironmentConfig  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SandboxUnavailable(
            'Harbor is not installed; type: pip install "backtalk[harbor]" (it needs Python 3.12 or newer)'
        ) from error
    if ":" in environment:
        return EnvironmentConfig(import_path=environment, kwargs=dict(kwargs))
    if environment not in list(EnvironmentType):
        names = ", ".join(sorted(EnvironmentType))
        raise ConfigError(f"Harbor has no environment {environment!r}; use module:Class, or one of {names}")
    return EnvironmentConfig(type=environment, kwargs=dict(kwargs))


@asynccontextmanager
async def start_environment(
    environment: str, kwargs: Mapping[str, Any], definition: Path, name: str, config: Any, folder: Path
) -> AsyncGenerator[BaseEnvironment]:
    """Start a Harbor environment of ``definition`` (a task's environment folder); stop and delete it on exit.

    ``config`` is Harbor's EnvironmentConfig of a task; the trial's own files go to ``folder``.

    Raises:
        SandboxError: it could not be made or started.
    """
    trial = _trial_config(environment, kwargs)
    from harbor.environments.factory import EnvironmentFactory  # pyright: ignore[reportMissingImports]
    from harbor.models.trial.paths import TrialPaths  # pyright: ignore[reportMissingImports]

    paths = TrialPaths(folder / "trial")
    paths.mkdir()
    inner: BaseEnvironment | None = None
    try:
        try:
            inner = made = EnvironmentFactory.create_environment_from_config(
                config=trial,
                environment_dir=definition,
                environment_name=name,
                session_id=f"{name}-{secrets.token_hex(6)}__env",
                trial_paths=paths,
                task_env_config=config.model_copy(deep=True),
                network_policy=config.resolve_baseline(),
                mounts=_log_mounts(paths),
            )
            await made.start(force_build=False)
        except Exception as error:
            raise SandboxError(f"Harbor's environment {environment} did not start: {describe(error)}") from error
        yield made
    finally:
        if inner is not None:
            await inner.stop(delete=True)


def _log_mounts(paths: Any) -> Sequence[dict[str, Any]]:
    """Return mounts of the log folders, as Harbor's own trials give them: some environments mount, others make them."""
    folders = {
        "/logs/verifier": paths.verifier_dir,
        "/logs/agent": paths.agent_dir,
        "/logs/artifacts": paths.artifacts_dir,
    }
    return [{"type": "bind", "source": str(folder.resolve()), "target": target} for target, folder in folders.items()]
