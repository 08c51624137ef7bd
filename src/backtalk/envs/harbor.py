"""Tasks of Harbor's datasets in Harbor's environments, scored by Harbor's verifier, for our rollouts.

Nothing of the task is translated: Harbor builds its image, our loop plays, Harbor's own verifier scores. That is what
a number has to rest on that is compared with a benchmark's, for example Terminal-Bench. For the tasks that a sandbox
of ours can hold, `backtalk.tasks.folder` is quicker and needs neither Harbor nor containers.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backtalk.envs.base import WorldReport
from backtalk.envs.terminal import ANSWER, TerminalConfig, TerminalEnv
from backtalk.errors import ConfigError, TaskError, VerifierError
from backtalk.sandboxes.base import SandboxFile
from backtalk.sandboxes.harbor.backend import started
from backtalk.sandboxes.harbor.session import HarborSandbox, words
from backtalk.sandboxes.images.world import read_tree
from backtalk.tasks.task import Split, Task

_UNLIMITED = {"disk_mb": 1 << 20, "processes": 1 << 15}  # the task's own image and resources are what limits it


async def load_harbor_dataset(dataset: str, *, names: Sequence[str] = (), count: int | None = None) -> list[Task]:
    """The tasks of a folder, of one task's folder, or of ``name@version`` in Harbor's registry, which it downloads.

    ``names`` are patterns such as ``git-*``; ``count`` takes the first ones.

    Raises:
        ConfigError: no such dataset, none of its tasks has such a name, or the registry cannot be reached.
        TaskError: a task that this loop cannot play: several steps, or a verifier in an environment of its own.
    """
    from harbor.models.job.config import DatasetConfig  # pyright: ignore[reportMissingImports]
    from harbor.tasks.client import TaskClient  # pyright: ignore[reportMissingImports]

    path = Path(dataset)
    if (path / "task.toml").is_file():
        return [_read_task(path)]
    name, _, version = dataset.partition("@")
    where: dict[str, Any] = {"path": path} if path.is_dir() else {"name": name, "version": version or None}
    try:
        config = DatasetConfig(**where, task_names=list(names) or None, n_tasks=count)
        found = [one.get_task_id() for one in await config.get_task_configs()]
        folders = (await TaskClient().download_tasks(found)).paths
    except Exception as error:  # whatever a registry's or git's library raises
        raise ConfigError(
            f"Harbor has no tasks for {dataset!r}: {words(error)}; give a folder of tasks, or name@version of a "
            "registry that this machine can reach (`harbor datasets list`)"
        ) from error
    return [_read_task(folder) for folder in folders]


def _read_task(folder: Path) -> Task:
    """One task as Harbor reads it; its world stays Harbor's to build, so the task brings no files and no setup.

    Raises:
        TaskError: the folder is no task of Harbor's, or one that this loop cannot play.
    """
    from harbor.models.task.task import Task as HarborTask  # pyright: ignore[reportMissingImports]

    try:
        read = HarborTask(folder)
    except Exception as error:
        raise TaskError(f"Harbor cannot read the task in {folder}: {words(error)}") from error
    if read.has_steps:
        raise TaskError(f"{folder}: a task of several steps is not played here; run it with `harbor run`")
    verifier = read.config.verifier
    separate = verifier.environment is not None or (verifier.environment_mode or "shared") != "shared"
    if separate or verifier.collect or getattr(verifier, "import_path", None):  # newer releases have the last
        raise TaskError(f"{folder}: its verifier is more than a script in the agent's environment; use `harbor run`")
    return Task(
        id=read.name,
        instruction=read.instruction,
        tests=read_tree(folder / "tests"),
        agent_timeout_s=read.config.agent.timeout_sec or 600.0,
        verifier_timeout_s=read.config.verifier.timeout_sec,
        metadata={"harbor_folder": str(folder.resolve())},
    )


class HarborTaskEnv(TerminalEnv):
    """A terminal in Harbor's environment of a task. The session begins where the image does, with its variables."""

    def __init__(self, task: Task, sandbox: HarborSandbox, config: TerminalConfig, verifier: Any, inner: Any) -> None:
        super().__init__(task, sandbox, config)
        self._verifier, self._inner = verifier, inner

    async def score(self) -> float | None:
        """What Harbor's verifier gives: "reward", or the mean of its numbers.

        As Harbor has it, the agent's processes live on while the tests run: some tests talk to them.

        Raises:
            VerifierError: no finite reward was left in time.
        """
        if self._answer is not None:
            await self._sandbox.put({ANSWER: SandboxFile(self._answer.encode("utf-8", "replace"))})
        try:
            async with asyncio.timeout(self.task.verifier_timeout_s):
                with self._inner.with_default_user(self._verifier.task.config.verifier.user):
                    rewards = (await self._verifier.verify()).rewards
        except Exception as error:  # Harbor's own errors share no base class
            raise VerifierError(f"Harbor's verifier gave no reward for {self.task.id!r}: {words(error)}") from error
        numbers = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
        if not numbers:
            raise VerifierError(f"Harbor's verifier gave no number for {self.task.id!r}; got {rewards!r}")
        return float(numbers["reward"]) if "reward" in numbers else sum(numbers.values()) / len(numbers)


@asynccontextmanager
async def open_harbor_env(
    task: Task,
    environment: str = "docker",
    config: TerminalConfig | None = None,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> AsyncIterator[HarborTaskEnv]:
    """The environment of a task from `load_harbor_dataset`, gone on exit.

    Raises:
        ConfigError: the task did not come from `load_harbor_dataset`.
        SandboxError: the environment could not be built or started.
    """
    from harbor.models.task.task import Task as HarborTask  # pyright: ignore[reportMissingImports]
    from harbor.models.trial.paths import TrialPaths  # pyright: ignore[reportMissingImports]
    from harbor.verifier.verifier import Verifier  # pyright: ignore[reportMissingImports]

    if "harbor_folder" not in task.metadata:
        raise ConfigError(
            f"task {task.id!r} has no folder of Harbor's; load it with backtalk.envs.harbor.load_harbor_dataset"
        )
    read, config = HarborTask(Path(task.metadata["harbor_folder"])), config or TerminalConfig()
    wanted, definition = read.config.environment, read.paths.environment_dir
    with tempfile.TemporaryDirectory(prefix="backtalk-harbor-", ignore_cleanup_errors=True) as folder:
        async with started(environment, kwargs, definition, read.short_name, wanted, Path(folder)) as inner:
            inner.default_user = read.config.agent.user
            sandbox = HarborSandbox(inner, replace(config.sandbox, **_UNLIMITED), home=None)
            await sandbox.start()
            if wanted.healthcheck is not None:
                await inner.run_healthcheck()
            verifier = Verifier(task=read, trial_paths=TrialPaths(Path(folder) / "trial"), environment=inner)
            yield HarborTaskEnv(task, sandbox, config, verifier, inner)


class HarborWorld:
    """Harbor's environments for tasks from `load_harbor_dataset` (a ``World``)."""

    def __init__(
        self,
        environment: str = "docker",
        config: TerminalConfig | None = None,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._environment, self._config, self._kwargs = environment, config, kwargs

    @property
    def report(self) -> WorldReport:
        return WorldReport(f"terminal in harbor:{self._environment}", ("what is isolated is up to the provider",))

    def tasks(self, split: Split, count: int, seed: int) -> Sequence[Task]:
        """Return no task: a dataset of Harbor's is measured as a whole, by ``load_harbor_dataset``."""
        return ()

    def open(self, task: Task) -> AbstractAsyncContextManager[HarborTaskEnv]:
        return open_harbor_env(task, self._environment, self._config, self._kwargs)

    async def close(self) -> None:
        """Nothing is kept between episodes."""
