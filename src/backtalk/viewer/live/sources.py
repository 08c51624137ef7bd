"""Find what the page shows: run folders, also in folders of them, and files of trajectories in any readable format."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Literal

from backtalk.errors import BacktalkError, DataError
from backtalk.exchange.read.files import Refusal, RendererOf, Rollout, import_record, is_text
from backtalk.run.log import RunLog, write_trajectories
from backtalk.run.log.scores import SUFFIX, scores_beside, tokens_scored
from backtalk.run.log.sources import OPTIONS, read_rollouts
from backtalk.trajectory import Trajectory
from backtalk.viewer.data import load_tokenizer

SUFFIXES = (".jsonl", ".json", ".traj", ".parquet", ".eval", ".jsonl.gz", ".json.gz", ".traj.gz", ".eval.gz")
MAX_DEPTH = 5  # of runs below a folder that is given
NOT_RUNS = {"checkpoint", "tokenizer", "groups", "weights", "scores", "configs", "logs", "node_modules"}
NEVER_TRAJECTORIES = {"study.json", "metrics.jsonl", "config.json", "tokenizer.json", "tokenizer_config.json"}
RESCAN_S = 2.0

Kind = Literal["train", "eval", "file"]
Stamp = tuple[int, ...]


def stamp_of(*paths: Path | None) -> Stamp:
    """Return time of change, size and inode of each file, to compare with later; -1 for a missing file."""
    found: list[int] = []
    for path in paths:
        try:
            status = path.stat() if path else None
        except OSError:
            status = None
        found += [-1] if status is None else [status.st_mtime_ns, status.st_size, status.st_ino]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Part:
    """A Parquet file of trajectories: of a training step, of an evaluation, or of an import."""

    key: str  # "train-3", "eval-0", "file"
    kind: Kind
    step: int | None
    path: Path
    weights: Path | None = None  # there only once the step has trained
    scores: Path | None = None  # there only where `backtalk score` was asked

    @property
    def stamp(self) -> Stamp:
        """Return the stamp of the file, its weights and its scores."""
        return stamp_of(self.path, self.weights, self.scores)


@dataclass
class RunSource:
    """A run folder."""

    name: str
    log: RunLog

    refusals: Sequence[Refusal] = ()

    def parts(self) -> list[Part]:
        """Return the files of trajectories that are there now, the newest first."""
        log = self.log
        parts = [
            Part(f"train-{s}", "train", s, log.groups_path(s), log.weights_path(s), log.scores_path(s))
            for s in log.group_steps()
        ]
        for s in log.evaluation_steps():
            if (path := log.evaluation_path(s).with_suffix(".parquet")).is_file():
                parts.append(Part(f"eval-{s}", "eval", s, path, None, log.scores_path(s, evaluation=True)))
        return sorted(parts, key=lambda part: (part.step or 0, part.kind), reverse=True)

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the run."""
        return load_tokenizer(self.log.tokenizer_path)

    @cached_property
    def tool_format(self) -> str | None:
        """Return the format of tool calls that the run names, if it names one."""
        with suppress(DataError):
            return (self.log.read_config().get("renderer") or {}).get("tool_format")
        return None

    @property
    def tokens_of(self) -> str | None:
        """Return the name of the model whose tokens are shown; None if they are the run's own."""
        return None


@dataclass
class FileSource:
    """A file of trajectories: ours, or of a format that `backtalk import` reads.

    It is read when somebody looks, into a Parquet file in a temporary folder, and again when it changes.
    """

    name: str
    path: Path
    model: str | None
    scratch: Path
    refusals: Sequence[Refusal] = ()
    tokenizer: Any = None
    tool_format: str | None = None
    tokens_of: str | None = None
    _stamp: Stamp | None = None
    _parts: list[Part] | BacktalkError = field(default_factory=list)
    _lock: Any = field(default_factory=Lock)

    def parts(self) -> list[Part]:
        """Return the file's trajectories as Parquet, read now if they have not been.

        Raises:
            DataError: the file cannot be read at all.
            ConfigError: the model of its tokens cannot be found.
        """
        with self._lock:
            if self._stamp != (now := stamp_of(self.path, scores_beside(self.path))):
                self._stamp = now
                try:
                    self._parts = self._read()
                except BacktalkError as error:  # it is read again only when it has changed
                    self._parts = error
            if isinstance(self._parts, BacktalkError):
                raise self._parts
            return self._parts

    def _read(self) -> list[Part]:
        if found := RunLog.of_groups(self.path):
            log, step = found
            self.tokenizer = load_tokenizer(log.tokenizer_path)
            return [Part("file", "file", step, self.path, log.weights_path(step), log.scores_path(step))]
        used: set[str] = set()
        scored = tokens_scored(scores_beside(self.path))  # which say whose tokens text was written in

        def read(rollout: Rollout) -> Trajectory:
            is_said = rollout.source is not None and is_text(rollout)
            model = self.model or scored or ("base" if is_said else None)
            used.update({model} if model else ())
            renderer_of = _renderer_of(model) if model else None
            return import_record(rollout.record, rollout.source, renderer_of, OPTIONS, name=self.path.name)

        imported = read_rollouts([self.path], read)
        self.refusals = imported.refusals
        self.tokens_of = next(iter(used), self.model)
        self.tokenizer = None if self.tokens_of is None else _tokenizer(self.tokens_of)
        path = self.scratch / f"{abs(hash(self.name)):x}.parquet"
        write_trajectories(path, imported.trajectories)
        return [Part("file", "file", None, path, None, scores_beside(self.path))]


Source = RunSource | FileSource


def parts_of(sources: Iterable[Source], problems: list[str]) -> Iterator[tuple[Source, Part]]:
    """Yield the files of trajectories of each source; add what is wrong with a source to ``problems``."""
    for source in sources:
        try:
            parts = source.parts()
        except Exception as error:  # any reader of a foreign file may raise anything; it costs that file
            problems.append(f"{source.name}: {error}")
            continue
        yield from ((source, part) for part in parts)


def _renderer_of(model: str) -> RendererOf:
    from backtalk.language.renderer import Renderer

    renderer: Renderer = _renderer(model)
    return renderer.for_tools


def _renderer(model: str) -> Any:
    if model not in _RENDERERS:
        from backtalk.language.renderer import Renderer, RendererConfig
        from backtalk.language.tokenizer import model_location

        _RENDERERS[model] = Renderer.from_pretrained(model_location(model), (), RendererConfig(on_drift="fork"))
    return _RENDERERS[model]


_RENDERERS: dict[str, Any] = {}


def _tokenizer(model: str) -> Any:
    from backtalk.language.tokenizer import load_tokenizer as load
    from backtalk.language.tokenizer import model_location

    return load(model_location(model)).backend_tokenizer


class Library:
    """All that was given on the command line, by name; it looks again for new runs every few seconds.

    A request names a source and never a path, so nothing outside what was given can be read.
    """

    def __init__(self, paths: Sequence[Path], model: str | None = None) -> None:
        self._paths, self._model = [path.expanduser() for path in paths], model
        self._scratch: TemporaryDirectory[str] | None = None
        self._sources: dict[Path, Source] = {}
        self._looked_at = float("-inf")
        self._lock = Lock()

    def sources(self) -> dict[str, Source]:
        """Return the runs and files by name, looked for again every few seconds."""
        with self._lock:
            if time.monotonic() - self._looked_at > RESCAN_S:
                found = {path: name for root in self._paths for name, path in _look(root)}
                names = _distinct(found)
                self._sources = {path: self._sources.get(path) or self._open(path, names[path]) for path in found}
                self._looked_at = time.monotonic()
            return {source.name: source for source in self._sources.values()}

    def source(self, name: str) -> Source:
        """Return a source by its name.

        Raises:
            DataError: there is none.
        """
        sources = self.sources()
        if name not in sources:
            raise DataError(f"there is no run or file {name!r} here; there are {', '.join(list(sources)[:8])}")
        return sources[name]

    def close(self) -> None:
        """Remove the temporary folder, if there is one."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _open(self, path: Path, name: str) -> Source:
        if (path / "config.yaml").is_file():
            return RunSource(name, RunLog(path))
        if self._scratch is None:
            self._scratch = TemporaryDirectory(prefix="backtalk-view-")
        return FileSource(name, path, self._model, Path(self._scratch.name))


def _look(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the runs and files of a path that was given, with their names."""
    if not root.is_dir():
        if root.exists():
            yield root.name, root
        return
    if _is_run(root):
        yield root.resolve().name, root
        return
    runs = list(_runs_below(root, MAX_DEPTH))
    yield from ((str(path.relative_to(root)), path) for path in runs)
    if any(entry.is_dir() and (entry / "result.json").is_file() for entry in _entries(root)):
        yield root.resolve().name, root  # a job of Harbor
        return
    for path in _entries(root):
        known = path.name.endswith(SUFFIXES) and not path.name.endswith(SUFFIX)
        if path.is_file() and known and path.name not in NEVER_TRAJECTORIES:
            yield path.name, path


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    for entry in _entries(folder):
        if not entry.is_dir() or entry.name.startswith(".") or entry.name in NOT_RUNS or entry.is_symlink():
            continue
        if _is_run(entry):
            yield entry
        elif depth > 1:
            yield from _runs_below(entry, depth - 1)


def _is_run(folder: Path) -> bool:
    try:
        return re.search(rb"(?m)^engine:", (folder / "config.yaml").read_bytes()) is not None
    except OSError:
        return False


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _distinct(found: dict[Path, str]) -> dict[Path, str]:
    """Return a name for each path; those that would be the same get the folder they are in, then a number."""
    names: dict[Path, str] = {}
    for path, name in found.items():
        wanted = name if list(found.values()).count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        number = 1
        while wanted in names.values():
            number += 1
            wanted = f"{wanted.rpartition(' ')[0] if number > 2 else wanted} {number}"
        names[path] = wanted
    return names
