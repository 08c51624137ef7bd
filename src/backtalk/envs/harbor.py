"""Run rollouts of Harbor's datasets in Harbor's environments, scored by Harbor's verifier.

Harbor builds the task's image and scores; only the agent's turns are ours. A number that is compared with a published
one, for example Terminal-Bench's, has to come from there. For tasks that our sandboxes can hold,
`backtalk.tasks.folder` is quicker and needs neither Harbor nor containers.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from backtalk.envs.base import WorldReport
from backtalk.envs.terminal import ANSWER, TerminalConfig, TerminalEnv
from backtalk.errors import ConfigError, TaskError, VerifierError
from backtalk.sandboxes.base import SandboxFile
from backtalk.sandboxes.harbor.backend import start_environment
from backtalk.sandboxes.harbor.session import HarborSandbox, describe
from backtalk.sandboxes.images.start_state import read_tree
from backtalk.tasks.task import Split, Task

_UNLIMITED = {"disk_mb": 1 << 20, "processes": 1 << 15}  # the task's own image and resources are what limits it


async def load_harbor_dataset(dataset: str, *, names: Sequence[str] = (), count: int | None = None) -> list[Task]:
    """Load the tasks of a folder, of one task's folder, or of ``name@version`` in Harbor's registry, by download.

    ``names`` are patterns such as ``git-*``; ``count`` is how many to load at most.

    Raises:
        ConfigError: no such dataset, none of its tasks has such a name, or the registry cannot be reached.
        TaskError: a task cannot run here: it has several steps, or a verifier in an environment of its own.
    """
    from harbor.models.job.config import DatasetConfig  # pyright: ignore[reportMissingImports]
    from harbor.tasks.client import TaskClient  # pyright: ignore[reportMissingImports]

    path = Path(dataset)
    if (path / "task.toml").is_file():
        return [_read_task(path)]
    name, _, version = dataset.partition("@")
    source: dict[str, Any] = {"path": path} if path.is_dir() else {"name": name, "version": version or None}
    try:
        config = DatasetConfig(**source, task_names=list(names) or None, n_tasks=count)
        found = [task.get_task_id() for task in await config.get_task_configs()]
        folders = (await TaskClient().download_tasks(found)).paths
    except Exception as error:  # whatever a registry's or git's library raises
        raise ConfigError(
            f"Harbor has no tasks for {dataset!r}: {describe(error)}; give a folder of tasks, or name@version of a "
            "registry that this machine can reach (`harbor datasets list`)"
        ) from error
    return [_read_task(folder) for folder in folders]


def _read_task(folder: Path) -> Task:
    """Read one task with Harbor, which also builds its environment: the task has no files and no setup."""
    from harbor.models.task.task import Task as HarborTask  # pyright: ignore[reportMissingImports]

    try:
        read = HarborTask(folder)
    except Exception as error:
        raise TaskError(f"Harbor cannot read the task in {folder}: {describe(error)}") from error
    if read.has_steps:
        raise TaskError(f"{folder}: a task of several steps cannot run here; run it with `harbor run`")
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
    """A terminal in Harbor's environment of a task; it starts in the image's folder, with the image's variables."""

    def __init__(self, task: Task, sandbox: HarborSandbox, config: TerminalConfig, verifier: Any, inner: Any) -> None:
        super().__init__(task, sandbox, config)
        self._verifier, self._inner = verifier, inner

    async def score(self) -> float | None:
        """Return the reward of Harbor's verifier: "reward", or the mean of its numbers.

        As in Harbor, the agent's processes live on while the tests run: some tests talk to them.

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
            raise VerifierError(f"Harbor's verifier gave no reward for {self.task.id!r}: {describe(error)}") from error
        numbers = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
        if not numbers:
            raise VerifierError(f"Harbor's verifier gave no number for {self.task.id!r}; got {rewards!r}")
        return float(numbers["reward"]) if "reward" in numbers else sum(numbers.values()) / len(numbers)


class HarborWorld:
    """Environments of Harbor's provider ``environment``, for tasks from ``load_harbor_dataset`` (a ``World``)."""

    def __init__(self, environment: str = "docker", config: TerminalConfig | None = None) -> None:
        self._environment, self._config = environment, config or TerminalConfig()

    @property
    def report(self) -> WorldReport:
        """Return the provider's name; its isolation is not ours to know."""
        return WorldReport(f"terminal in harbor:{self._environment}", ("what is isolated is up to the provider",))

    def tasks(self, split: Split, count: int, seed: int) -> Sequence[Task]:
        """Return no task: a dataset of Harbor's is measured as a whole, by ``load_harbor_dataset``."""
        return ()

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[HarborTaskEnv]:
        """Build and start the environment of a task; it is removed on exit.

        Raises:
            ConfigError: the task did not come from ``load_harbor_dataset``.
            SandboxError: the environment could not be built or started.
        """
        from harbor.models.task.task import Task as HarborTask  # pyright: ignore[reportMissingImports]
        from harbor.models.trial.paths import TrialPaths  # pyright: ignore[reportMissingImports]
        from harbor.verifier.verifier import Verifier  # pyright: ignore[reportMissingImports]

        if "harbor_folder" not in task.metadata:
            raise ConfigError(f"task {task.id!r} has no folder of Harbor's; load it with load_harbor_dataset")
        read = HarborTask(Path(task.metadata["harbor_folder"]))
        wanted, definition = read.config.environment, read.paths.environment_dir
        with tempfile.TemporaryDirectory(prefix="backtalk-harbor-", ignore_cleanup_errors=True) as folder:
            async with start_environment(
                self._environment, {}, definition, read.short_name, wanted, Path(folder)
            ) as inner:
                inner.default_user = read.config.agent.user
                sandbox = HarborSandbox(inner, replace(self._config.sandbox, **_UNLIMITED), home=None)
                await sandbox.start()
                if wanted.healthcheck is not None:
                    await inner.run_healthcheck()
                verifier = Verifier(task=read, trial_paths=TrialPaths(Path(folder) / "trial"), environment=inner)
                yield HarborTaskEnv(task, sandbox, self._config, verifier, inner)

    async def close(self) -> None:
        """Do nothing: the environment of a rollout is gone when the rollout ends."""
