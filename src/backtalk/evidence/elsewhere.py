"""Evaluate the runs of a study in another world than the one they were trained in, before and after."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backtalk.errors import BacktalkError, ConfigError
from backtalk.evidence.compare import Evaluations
from backtalk.files import log_tail, read_json, write_bytes
from backtalk.settings import flatten

Key = tuple[str, int]  # arm and seed of a run
RunCommand = Callable[[Sequence[str], Path], Awaitable[None]]  # arguments of ``backtalk``, file of its output


def read_elsewhere(places: Any, study: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each place by dotted key.

    Raises:
        ConfigError: no mapping of names to settings, or a name that no folder can have.
    """
    if not isinstance(places or {}, dict) or not all(
        isinstance(settings, dict) and settings and re.fullmatch(r"\w[\w.-]*", str(name))
        for name, settings in (places or {}).items()
    ):
        raise ConfigError(
            f"study {study} has elsewhere={places!r}; give names with the settings of an evaluation, for example "
            "'elsewhere: {harder: {tasks.levels: [3, 4]}}'"
        )
    return {str(name): flatten(settings) for name, settings in (places or {}).items()}


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A place to evaluate in: the folder of its results, and the settings that differ from those of the runs."""

    folder: Path
    settings: Mapping[str, Any]

    async def evaluate(self, runs: Mapping[Key, tuple[Path, int]], run_command: RunCommand) -> dict[Key, Evaluations]:
        """Evaluate each run, given by folder and steps, before and after; what is there already is not done again.

        Raises:
            ConfigError: the folder holds results under other settings.
            BacktalkError: an evaluation failed.
        """
        self._check_same()
        paths = {(key, base): self._path(run, base) for key, (run, _) in runs.items() for base in (True, False)}
        missing = [(runs[key][0], base, path) for (key, base), path in paths.items() if not path.exists()]
        await asyncio.gather(*(run_command(self._command(*one), one[-1].with_suffix(".txt")) for one in missing))
        if failed := [path for _, _, path in missing if not path.exists()]:
            log_path = failed[0].with_suffix(".txt")
            raise BacktalkError(
                f"{', '.join(path.stem for path in failed)} could not be evaluated in {self.folder.name}; the end of "
                f"{log_path} is:\n{log_tail(log_path)}\nStart the study again to repeat only what is missing"
            )
        return {
            key: {0: read_json(paths[key, True]), steps: read_json(paths[key, False])}
            for key, (_, steps) in runs.items()
        }

    def _path(self, run: Path, base: bool) -> Path:
        return self.folder / f"{run.name}_{'before' if base else 'after'}.json"

    def _check_same(self) -> None:
        path, settings = self.folder / "settings.json", json.loads(json.dumps(dict(self.settings)))
        if path.exists() and read_json(path) != settings:
            raise ConfigError(
                f"{self.folder} holds evaluations under other settings; give this place another name in `elsewhere`"
            )
        write_bytes(path, (json.dumps(settings, indent=1) + "\n").encode())

    def _command(self, run: Path, base: bool, path: Path) -> list[str]:
        settings = [part for key, value in self.settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        return ["evaluate", str(run), "--json", str(path), *(["--base"] if base else []), *settings]
