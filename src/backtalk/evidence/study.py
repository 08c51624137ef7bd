"""Run a study: arms times seeds, each a training run in a process of its own, compared with intervals.

Every run is the command line's own ``train``, so what a study measures is what a user gets. Runs that are
finished are not run again: a study that was stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backtalk.errors import BacktalkError, ConfigError, merge_repeats
from backtalk.evidence.arms import read_arms
from backtalk.evidence.budget import spent_by_step
from backtalk.evidence.compare import Comparison, Evaluations, compare
from backtalk.evidence.elsewhere import Elsewhere, read_elsewhere
from backtalk.files import log_tail, write_bytes
from backtalk.run.config import TrainConfig, config_from_dict, config_to_dict, setting_schemas
from backtalk.run.log import RunLog, lock_folder
from backtalk.run.settings_file import parse_overrides, read_settings, read_yaml
from backtalk.sandboxes.machine.capacity import SHARED_BY
from backtalk.settings import flatten

POLL_S = 0.5
STOP_WAIT_S = 30.0  # for runs to end by themselves when the study is stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """``arms`` are settings by dotted key, laid over ``settings``, laid over the run that ``base`` names."""

    name: str
    base: str
    arms: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # where ``base`` may lie
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings, by dotted key, under which every run is evaluated once more, before and after, by name."""

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ConfigError(f"study {self.name!r} has {len(self.arms)} arms and {len(self.seeds)} seeds; give both")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study {self.name!r} has a seed twice in {list(self.seeds)}; a seed is one run an arm")

    def config(self, arm: str, seed: int) -> TrainConfig:
        """Return the settings of one run."""
        overrides = {**self.settings, **self.arms[arm], "seed": seed}
        return config_from_dict(read_settings(self.base, self.folder), overrides)


@dataclass(frozen=True, slots=True)
class StudyStarted:
    """A study has begun."""

    folder: Path
    runs: tuple[str, ...]
    finished: tuple[str, ...]  # from an earlier start, not run again
    parallel: int


@dataclass(frozen=True, slots=True)
class StudyProgress:
    """A run has finished a step, or an evaluation; ``metrics`` are its latest."""

    run: str
    step: int  # steps done
    steps: int
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StudyRunDone:
    """The process of a run has ended."""

    run: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class StudyDone:
    """A study has ended."""

    folder: Path
    comparison: Comparison


StudyEvent = StudyStarted | StudyProgress | StudyRunDone | StudyDone
OnStudyEvent = Callable[[StudyEvent], None]


def load_study(source: str | Path, *, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()) -> Study:
    """Return the study of a preset's name or a YAML file; ``overrides`` are settings of every arm.

    Raises:
        ConfigError: no such file, unknown keys, or settings that no run could have.
    """
    tree, folder = read_yaml(source)
    if "arms" not in tree and tree.keys() & {key.partition(".")[0] for key in setting_schemas()}:
        raise ConfigError(f"{source} is a run, not a study; start it with: backtalk train {source}")
    known = {"name", "base", "seeds", "settings", "arms", "elsewhere"}
    if unknown := sorted(tree.keys() - known):
        raise ConfigError(f"unknown keys {unknown} in study {source}; a study has {', '.join(sorted(known))}")
    study = Study(
        name=str(tree.get("name", Path(str(source)).stem)),
        base=str(tree.get("base", "triage")),
        arms=read_arms(tree.get("arms"), str(source)),
        seeds=tuple(tree.get("seeds", (0,)) if seeds is None else seeds),
        settings=flatten(tree.get("settings") or {}) | parse_overrides(overrides),
        folder=folder,
        elsewhere=read_elsewhere(tree.get("elsewhere"), str(source)),
    )
    for arm in study.arms:  # a mistake is better found now than in an hour
        config = config_to_dict(study.config(arm, study.seeds[0]))
        for settings in study.elsewhere.values():
            config_from_dict(config, settings)
    return study


async def run_study(
    study: Study, folder: str | Path, *, parallel: int | None = None, on_event: OnStudyEvent | None = None
) -> Comparison:
    """Train every arm with every seed, ``parallel`` runs at once (by default one a core), and compare them.

    Raises:
        BacktalkError: a run failed; the others are finished first, and a new start repeats only what failed.
        ConfigError: the study is running already, or its folder holds another.
    """
    folder = Path(folder)
    with lock_folder(folder):
        return await _run_study(study, folder, parallel, on_event or (lambda event: None))


async def _run_study(study: Study, folder: Path, parallel: int | None, on_event: OnStudyEvent) -> Comparison:
    arms, seeds, configs = plan(study, folder)
    jobs = [_Job(key, config, folder) for key, config in configs.items()]
    for job in jobs:
        job.check_same()
    cores = len(os.sched_getaffinity(0))
    parallel = max(1, min(parallel or cores, len(jobs)))
    on_event(
        StudyStarted(folder, tuple(j.name for j in jobs), tuple(j.name for j in jobs if j.is_finished()), parallel)
    )
    places = asyncio.Semaphore(parallel)

    async def run(job: _Job) -> None:
        async with places:
            if not job.is_finished():
                await job.run(parallel, on_event)

    try:
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(run(job))
    except ExceptionGroup as errors:
        raise merge_repeats(errors) from None
    failed = [job for job in jobs if not job.is_finished()]
    if failed:
        raise BacktalkError(
            f"{', '.join(job.name for job in failed)} did not finish; the end of {failed[0].log_path} is:\n"
            f"{log_tail(failed[0].log_path)}\nStart the study again to repeat only what is missing"
        )
    evaluations = {job.key: job.evaluations() for job in jobs}
    spent = {job.key: spent_by_step(job.log.read_metrics()) for job in jobs}
    comparison = compare(study.name, arms, seeds, evaluations, spent)
    elsewhere = {}
    for name, settings in study.elsewhere.items():
        place = Elsewhere(folder / "elsewhere" / name, settings)
        runs = {job.key: (job.log.folder, job.config.steps) for job in jobs}
        found = await place.evaluate(runs, lambda command, path: _evaluate(command, path, places, parallel))
        elsewhere[name] = compare(name, arms, seeds, found).results
    comparison = replace(comparison, elsewhere=elsewhere)
    write_bytes(folder / "study.json", (json.dumps(comparison.to_dict(), indent=1) + "\n").encode())
    on_event(StudyDone(folder, comparison))
    return comparison


def plan(study: Study, folder: Path) -> tuple[tuple[str, ...], tuple[int, ...], dict[tuple[str, int], TrainConfig]]:
    """Return the arms, the seeds and the settings of every run: the study's, and those that its folder holds already.

    So arms and seeds can be added later, and none is dropped from the comparison. Every arm is trained with every seed.
    """
    known: dict[str, TrainConfig] = {}
    seeds = set(study.seeds)
    for path in sorted(folder.glob("*/config.yaml")):
        if match := re.fullmatch(r"(.+)_seed(\d+)", path.parent.name):
            seeds.add(int(match[2]))
            if match[1] not in study.arms:
                known[match[1]] = config_from_dict(RunLog(path.parent).read_config())
    configs = {
        (arm, seed): study.config(arm, seed) if arm in study.arms else replace(known[arm], seed=seed)
        for seed in sorted(seeds)
        for arm in (*study.arms, *known)
    }
    return (*study.arms, *known), tuple(sorted(seeds)), configs


class _Job:
    """One run of a study: its folder, and its process."""

    def __init__(self, key: tuple[str, int], config: TrainConfig, study_folder: Path) -> None:
        self.key, name = key, f"{key[0]}_seed{key[1]}"
        if config.evaluation.tasks == 0:
            raise ConfigError(
                f"run {name} measures nothing (evaluation.tasks=0), so it cannot be compared; set it above 0"
            )
        self.name, self.config = name, config
        self.log = RunLog(study_folder / name)
        self.config_path = study_folder / "configs" / f"{name}.yaml"
        self.log_path = study_folder / "logs" / f"{name}.txt"

    def is_finished(self) -> bool:
        return self.log.evaluation_path(self.config.steps).exists()

    def evaluations(self) -> Evaluations:
        return {
            step: self.log.read_evaluation(step) | {"world_model": self.log.read_world_model(step)}
            for step in self.log.evaluation_steps()
        }

    def check_same(self) -> None:
        """Raise ConfigError for a folder with another run, which would be taken for a finished one."""
        if self.log.config_path.exists() and config_from_dict(self.log.read_config()) != self.config:
            raise ConfigError(
                f"{self.log.folder} holds a run with other settings; choose a new folder for this study with --out"
            )

    async def run(self, parallel: int, on_event: OnStudyEvent) -> None:
        import yaml

        write_bytes(self.config_path, yaml.safe_dump(config_to_dict(self.config), sort_keys=False).encode())
        command = [sys.executable, "-m", "backtalk.cli", "train", str(self.config_path), "--out", str(self.log.folder)]
        command += ["--resume"] if self.log.config_path.exists() else []
        async with _process(command, self.log_path, parallel) as process:
            waiting = asyncio.ensure_future(process.wait())
            seen = self._done()
            while not waiting.done():
                await asyncio.wait([waiting], timeout=POLL_S)
                now = self._done()
                if now != seen:
                    seen = now
                    on_event(StudyProgress(self.name, now[0], self.config.steps, now[1]))
        on_event(StudyRunDone(self.name, process.returncode or 0))

    def _done(self) -> tuple[int, dict[str, Any]]:
        rows = self.log.read_metrics()
        return (rows[-1]["step"] + 1, rows[-1]) if rows else (0, {})


async def _evaluate(command: Sequence[str], log_path: Path, places: asyncio.Semaphore, parallel: int) -> None:
    async with places, _process([sys.executable, "-m", "backtalk.cli", *command], log_path, parallel) as process:
        await process.wait()


@asynccontextmanager
async def _process(command: Sequence[str], log_path: Path, parallel: int) -> AsyncIterator[Any]:
    """Start a process that ends when we do: interrupted, killed after a while, or by the kernel if we die."""
    environment = {**os.environ, SHARED_BY: str(parallel)}
    if parallel > 1:  # runs side by side would fight over the cores, and a waiting thread must not spin
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on, once
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(process.wait(), STOP_WAIT_S)
            except (TimeoutError, asyncio.CancelledError):
                process.kill()
                raise


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
