"""Harbor environment over a Backtalk sandbox: any Harbor agent and verifier, without a container or a daemon.

    harbor run -p my_task -a oracle --environment-import-path backtalk.hosts.harbor:BacktalkEnvironment

The sandbox starts as the task's Dockerfile says, in the subset that docs/tasks.md names; a line that a sandbox cannot
carry out is refused. Written against harbor 0.24.0 (``harbor/environments/base.py``).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any

import backtalk.sandboxes.harbor  # noqa: F401  # isort: skip  # before Harbor, to keep its telemetry off
from harbor.environments.base import BaseEnvironment, ExecResult  # pyright: ignore[reportMissingImports]
from harbor.environments.capabilities import (  # pyright: ignore[reportMissingImports]
    EnvironmentCapabilities,
    EnvironmentResourceCapabilities,
)
from harbor.models.task.config import NetworkMode, NetworkPolicy  # pyright: ignore[reportMissingImports]

from backtalk.envs.terminal import set_up_task
from backtalk.errors import SandboxError, SandboxUnavailable
from backtalk.sandboxes import Sandbox, SandboxBackend, SandboxChoice, SandboxFile, SandboxLimits, local_sandbox
from backtalk.sandboxes.images.start_state import StartState
from backtalk.tasks.folder import read_environment
from backtalk.tasks.task import Task

MEMORY_MB = 2048  # of a task that sets none
DISK_MB = 1024  # of a task that sets none; it is memory, taken only as files are written
PROCESSES = 512
OUTPUT_BYTES = 64 << 20  # of one command; Harbor has no limit
MAX_FILE_BYTES = 1 << 30
_NO_LIMIT_S = 7 * 86_400.0  # of a command without a time limit; Harbor limits the whole trial
_ONE_USER = (None, "root", "0", 0, "agent", "1000", 1000)

open_backend = cache(local_sandbox)  # one for all trials of a process

LOG_FOLDERS = ("/logs/agent", "/logs/verifier", "/logs/artifacts")  # that every container of Harbor has


class BacktalkEnvironment(BaseEnvironment):
    """A Harbor environment that is one Backtalk sandbox, for one trial.

    Options besides Harbor's own, given as ``--ek NAME=VALUE``:
        sandbox: auto, bubblewrap, or unsafe, which isolates nothing.
        host_packages: skip package managers in RUN lines, because this machine has what the task needs.
        offline: run a task that asks for the network without one; otherwise such a task is refused, as Harbor requires.
        processes: maximum number of processes in the sandbox.

    Raises:
        TaskError: the task's environment asks for something that a sandbox does not have.
        ValueError: a network policy that is not enforced here, a mount, or what Harbor itself refuses.
        SandboxUnavailable: no safe sandbox works on this machine.
    """

    def __init__(
        self,
        *args: Any,
        sandbox: SandboxChoice = "auto",
        host_packages: bool = False,
        offline: bool = False,
        processes: int = PROCESSES,
        **kwargs: Any,
    ) -> None:
        self._choice, self._host_packages, self._offline = sandbox, host_packages, offline
        self._processes = processes
        self._stack = AsyncExitStack()
        self._sandbox: Sandbox | None = None
        self._start_state = StartState()
        super().__init__(*args, **kwargs)

    @staticmethod
    def type() -> str:
        """Return the name of this kind of environment."""
        return "backtalk"

    @property
    def capabilities(self) -> EnvironmentCapabilities:
        """Return the capabilities for Harbor: no network, GPU or mounts. Offline, all network policies agree."""
        return EnvironmentCapabilities(disable_internet=True, dynamic_network_policy=self._offline)

    @classmethod
    def resource_capabilities(cls) -> EnvironmentResourceCapabilities:
        """Return which limits are enforced: memory, if the machine has a memory cgroup; not processor time."""
        return EnvironmentResourceCapabilities(memory_limit=open_backend().report.limits["memory"].startswith("cgroup"))

    @classmethod
    def preflight(cls) -> None:
        """Start a sandbox for trial, before any trial of Harbor's is queued."""
        try:
            open_backend()
        except SandboxUnavailable as error:
            raise SystemExit(str(error)) from error

    def validate_network_policy_support(self, network_policy: NetworkPolicy | None = None) -> None:
        """Refuse a network policy that a sandbox cannot enforce exactly, as Harbor requires."""
        if self._offline:
            return
        super().validate_network_policy_support(network_policy)
        if (network_policy or self.network_policy).network_mode is NetworkMode.PUBLIC:
            raise ValueError(
                f"task {self.environment_name} asks for the public network (Harbor's default), and a Backtalk sandbox "
                "has none; write network_mode = 'no-network' under [environment], or run it offline all the same "
                "with --ek offline=true"
            )

    async def _apply_network_policy(self, network_policy: NetworkPolicy) -> None:
        """Do nothing: this is called only offline, where every policy is the same."""

    def _validate_definition(self) -> None:
        """Read the task's environment, and refuse what a sandbox cannot carry out."""
        for mount in self._mounts:
            if not str(mount.get("target", "")).startswith("/logs/"):
                raise ValueError(f"mount {dict(mount)} cannot be made: a sandbox has no files of this machine in it")
        image = self.task_env_config.docker_image
        self._start_state = read_environment(self.environment_dir, image, host_packages=self._host_packages)

    @property
    def _workdir(self) -> str:
        return self.task_env_config.workdir or self._start_state.workdir

    @property
    def _limits(self) -> SandboxLimits:
        return SandboxLimits(
            memory_mb=self._effective_memory_mb or MEMORY_MB,
            disk_mb=self._effective_storage_mb or DISK_MB,
            processes=self._processes,
            output_bytes=OUTPUT_BYTES,
        )

    async def start(self, force_build: bool) -> None:
        """Open a fresh sandbox, write the task's files and run its RUN lines. Nothing is built or cached."""
        state = self._start_state
        task = Task(
            id=self.environment_name,
            instruction="",
            files=state.files,
            setup=state.commands(self._workdir),
            env=state.env,
            workdir=self._workdir,
        )
        backend: SandboxBackend = open_backend(self._choice)
        try:
            self._sandbox = await self._stack.enter_async_context(backend.open(self._limits))
            await set_up_task(self._sandbox, task)
            await self.ensure_dirs([*LOG_FOLDERS, *self._mount_targets(writable_only=True)])
            await self._upload_environment_dir_after_start()
        except BaseException:
            await self.stop(delete=True)
            raise

    async def stop(self, delete: bool) -> None:
        """Close the sandbox. It lies in memory, so that it is gone whatever ``delete`` says."""
        self._sandbox = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: float | None = None,
        user: str | int | None = None,
    ) -> ExecResult:
        """Run a command in a new bash; its background processes live on.

        Stdout and stderr come back as one, as with Harbor's Docker. Commands of one sandbox run one after the other.

        Raises:
            ValueError: another user than the sandbox's one ordinary user, which stands for root too.
            RuntimeError: the command ran into the time limit; all that it started was ended.
            SandboxError: the sandbox broke.
        """
        resolved = self._resolve_user(user)
        if resolved not in _ONE_USER:
            raise ValueError(
                f"user {resolved!r} does not exist: a sandbox has one ordinary user, which stands for root too; "
                "use root, or none"
            )
        result = await self._running.exec(
            f"bash -c {shlex.quote(command)}",
            timeout_s=timeout_sec or _NO_LIMIT_S,
            env=self._merge_env(env) or {},
            cwd=cwd or self._workdir,
        )
        if result.timed_out:
            raise RuntimeError(f"Command timed out after {timeout_sec} seconds")
        output = result.output
        if result.dropped_bytes:
            notice = f"\n[{result.dropped_bytes} bytes left out]\n"
            output = output[: result.dropped_at] + notice + output[result.dropped_at :]
        if (emit := self._output_callback()) is not None:
            await emit(output, "stdout")
        return ExecResult(stdout=output, return_code=result.exit_code)

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        """Write one file, with its mode."""
        await self._running.put({target_path: _file(Path(source_path))})

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        """Write the files of a folder, with their modes; links are written as what they point at."""
        files = {f"{target_dir}/{name}": _file(path) for name, path in _tree(Path(source_dir))}
        await self._inside(f"mkdir -p {shlex.quote(target_dir)}")
        await self._running.put(files)

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        """Read one regular file.

        Raises:
            FileNotFoundError: there is none.
        """
        content = await self._running.get(source_path, max_bytes=MAX_FILE_BYTES)
        if content is None:
            raise FileNotFoundError(f"there is no regular file {source_path} in the sandbox")
        target = Path(target_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        """Read every regular file of a folder; skip links, pipes and files that cannot be read.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        output = await self._inside(f"cd {shlex.quote(source_dir)} && find . -type f -printf '%P\\0'")
        Path(target_dir).mkdir(parents=True, exist_ok=True)
        for name in filter(None, output.split("\0")):
            content = await self._running.get(f"{source_dir}/{name}", max_bytes=MAX_FILE_BYTES)
            if content is not None:
                target = Path(target_dir, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

    async def _inside(self, command: str) -> str:
        """Run a command of ours in the root folder and return what it printed."""
        result = await self._running.exec(command, timeout_s=60, cwd="/")
        if result.exit_code != 0:
            raise FileNotFoundError(f"{command!r} in the sandbox exited {result.exit_code}: {result.output[-500:]}")
        return result.output

    @property
    def _running(self) -> Sandbox:
        if self._sandbox is None:
            raise SandboxError(f"the environment of {self.environment_name} is not started")
        return self._sandbox


def _file(path: Path) -> SandboxFile:
    return SandboxFile(path.read_bytes(), mode=path.stat().st_mode & 0o777)


def _tree(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path
