"""Tasks as rows: of JSONL and Parquet files, and of datasets on the Hugging Face hub.

    {"id": "count", "instruction": "How many lines has a.txt? Submit the number.",
     "files": {"a.txt": "1\\n2\\n"}, "tests": "grep -qx 2 /logs/agent/answer.txt && echo 1 > ..."}

docs/tasks.md lists the fields. A file with a row that cannot be a task is refused as a whole, before anything runs,
and every such row is named: a run on what happens to be readable would be another run.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backtalk.errors import ConfigError, DataError, TaskError
from backtalk.parquet import parquet_rows
from backtalk.sandboxes.base import HOME, SandboxFile
from backtalk.sandboxes.files import clean_path
from backtalk.tasks.folder import DEFAULT_TIMEOUT_S, add_needs, check_seconds, read_harbor_task
from backtalk.tasks.scripts import make_tests_offline
from backtalk.tasks.task import Task

SUFFIXES = (".jsonl", ".parquet")
INLINE = ("files", "setup", "env", "workdir", "tests", "solution")
FIELDS = ("id", "instruction", "folder", *INLINE, "agent_timeout_s", "verifier_timeout_s", "metadata")
MAX_REASONS = 20  # of bad rows that are spelled out; the others are named by number

Row = tuple[str, Any]  # where it stands ("line 3"), and what stands there


def read_row_file(path: str | Path, *, host_packages: bool = False, world_model_only: bool = False) -> list[Task]:
    """The tasks in one .jsonl or .parquet file, one a row, in its order.

    Raises:
        TaskError: some row is no task; the message names every such row, and the field that is wrong.
        DataError: the file cannot be read at all.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        rows = _json_rows(path)
    else:
        rows = ((f"row {number}", row) for number, row in enumerate(parquet_rows(path)))
    return _tasks(str(path), rows, path.parent, host_packages, world_model_only)


def read_hub(source: str, *, world_model_only: bool = False) -> list[Task]:
    """The tasks in a dataset of the Hugging Face hub, or in a folder that ``datasets`` can load.

    ``source`` is ``hf:owner/name`` or ``hf:owner/name:split``; the split is the dataset's own, "train" where none is
    named, and has nothing to do with what a run holds out.

    Raises:
        ConfigError: the library is missing, or there is no such dataset or split.
        TaskError: some row is no task.
    """
    name, _, split = source.removeprefix("hf:").partition(":")
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the library datasets; install it with: pip install 'backtalk[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"{source} cannot be loaded ({type(error).__name__}: {error}); write hf:owner/name or hf:owner/name:split, "
            "and check that this machine may reach the hub or has it in its cache"
        ) from error
    numbered = ((f"row {number}", row) for number, row in enumerate(rows))
    return _tasks(source, numbered, None, False, world_model_only)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); write one JSON object a line") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", TaskError(f"is not JSON: {error}")


def _tasks(
    source: str, rows: Iterator[Row], folder: Path | None, host_packages: bool, world_model_only: bool
) -> list[Task]:
    tasks: dict[str, Task] = {}
    places: dict[str, str] = {}
    errors: dict[str, str] = {}
    count = 0
    for place, row in rows:
        count += 1
        try:
            if isinstance(row, TaskError):
                raise row
            task = _task(row, folder, host_packages, world_model_only)
            if task.id in tasks:
                raise TaskError(f"id: {task.id!r} is the id of {places[task.id]} too; rename one")
            tasks[task.id], places[task.id] = task, place
        except TaskError as error:
            errors[place] = str(error)
        except RecursionError:
            errors[place] = "is nested too deeply to be read"
    if errors:
        reasons = [f"{place}: {reason}" for place, reason in list(errors.items())[:MAX_REASONS]]
        rest = list(errors)[MAX_REASONS:]
        more = f"\nand {', '.join(rest)}" if rest else ""
        raise TaskError(f"{len(errors)} of {count} rows of {source} cannot be tasks:\n" + "\n".join(reasons) + more)
    if not tasks:
        raise TaskError(f"{source} has no row; write one task a row, with the fields id, instruction and tests")
    return list(tasks.values())


def _task(row: Any, folder: Path | None, host_packages: bool, world_model_only: bool) -> Task:
    if not isinstance(row, Mapping):
        raise TaskError(f"holds a {type(row).__name__}, not an object with fields such as id and instruction")
    given = _without_nulls(row)  # whatever the format: Parquet and data sets fill in what is not there
    metadata = _metadata(given)
    if world_model_only:
        metadata["world_model_only"] = True
    given["metadata"] = metadata
    if "folder" in given:
        return _from_folder(given, folder, host_packages, metadata.get("world_model_only") is True)
    task = Task(
        id=_id(given),
        instruction=_text(given, "instruction"),
        workdir=(workdir := _workdir(given)),
        files={_path("files", posixpath.join(workdir, p)): f for p, f in _tree(given, "files", "").items()},
        setup=_setup(given),
        env=_env(given),
        tests={_path("tests", p, relative=True): f for p, f in _tree(given, "tests", "test.sh").items()},
        solution={_path("solution", p, relative=True): f for p, f in _tree(given, "solution", "solve.sh").items()},
        agent_timeout_s=_seconds(given, "agent_timeout_s", math.inf),
        verifier_timeout_s=_seconds(given, "verifier_timeout_s"),
        metadata=metadata,
    )
    return task if task.world_model_only else _scored(task, host_packages)


def _scored(task: Task, host_packages: bool) -> Task:
    if "test.sh" not in task.tests:
        raise TaskError(
            "tests: there is no test.sh, so nothing could score it; give the script, or world_model_only: true"
        )
    tests, notes = make_tests_offline(Path("tests"), task.tests, host_packages)
    metadata = dict(task.metadata) | ({"world_notes": notes} if notes else {})
    add_needs(metadata, task.tests)
    return replace(task, tests=tests, metadata=metadata)


def _from_folder(given: Mapping[str, Any], folder: Path | None, host_packages: bool, world_model_only: bool) -> Task:
    """A task folder, with what else the row says of it."""
    if folder is None:
        raise TaskError("folder: a dataset of the hub cannot name folders of this machine; put files and tests inline")
    if both := [name for name in INLINE if name in given]:
        raise TaskError(f"folder: {', '.join(both)} stand in the row and in the folder; keep one of the two")
    path = folder / _text(given, "folder")
    if not path.is_dir():
        raise TaskError(f"folder: there is no folder {path}; the path begins where the file of rows lies")
    task = read_harbor_task(path, host_packages=host_packages, world_model_only=world_model_only)
    return replace(
        task,
        id=_id(given) if "id" in given else task.id,
        instruction=_text(given, "instruction") if "instruction" in given else task.instruction,
        agent_timeout_s=_seconds(given, "agent_timeout_s", task.agent_timeout_s),
        verifier_timeout_s=_seconds(given, "verifier_timeout_s", task.verifier_timeout_s),
        metadata={**task.metadata, **given["metadata"]},
    )


def _metadata(given: Mapping[str, Any]) -> dict[str, Any]:
    """The field metadata, and every field nobody knows; one that is nearly a known one is a slip."""
    metadata = dict(_mapping(given, "metadata"))
    for name, value in given.items():
        if name in FIELDS:
            continue
        if name == "world_model_only" and not isinstance(value, bool):
            raise TaskError(f"{name}: {value!r} is not true or false")
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if near:
            raise TaskError(f"{name}: is no field; did you mean {near[0]!r}? What is yours goes into metadata")
        metadata[name] = value
    return metadata


def _id(given: Mapping[str, Any]) -> str:
    value = given.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(given, "id")


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{name}: {'is missing' if value is None else f'{value!r} is no text'}; every task needs one")
    return value


def _mapping(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name, {})
    if isinstance(value, str):  # as datasets whose rows differ often hold it
        try:
            value = json.loads(value)
        except ValueError as error:
            raise TaskError(f"{name}: {value[:80]!r} is no JSON object ({error})") from error
    if not isinstance(value, Mapping):
        raise TaskError(f"{name}: {value!r} is no object")
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Return a copy in which no object has a field that is null, at any depth; lists keep theirs."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _tree(given: Mapping[str, Any], name: str, only: str) -> dict[str, SandboxFile]:
    """Files by path. A text is the file ``only``; a list holds objects with path and content."""
    value = given.get(name, {})
    if isinstance(value, str) and only:
        return {only: SandboxFile(value.encode(), mode=0o755)}
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(one, Mapping) for one in value):
        if any(not isinstance(one.get("path"), str) for one in value):
            raise TaskError(f"{name}: an entry has no path; write {{path, content}} for each file")
        pairs = [(one["path"], {key: inner for key, inner in one.items() if key != "path"}) for one in value]
        if len(dict(pairs)) < len(pairs):
            raise TaskError(f"{name}: two entries have one path")
        value = dict(pairs)
    else:
        value = _mapping(given, name)
    return {str(path): _file(f"{name}: {path}", one) for path, one in value.items()}


def _file(what: str, value: Any) -> SandboxFile:
    if isinstance(value, Mapping):
        given = value
        mode, mtime = given.get("mode", "644"), given.get("mtime")
        if set(given) - {"content", "base64", "mode", "mtime"} or ("content" in given) == ("base64" in given):
            raise TaskError(f"{what}: has {', '.join(given) or 'nothing'}; write content or base64, and mode and mtime")
        if not isinstance(mode, str) or not re.fullmatch(r"[0-7]{3,4}", mode):
            raise TaskError(f'{what}: mode {mode!r} is no octal mode in quotes, such as "755"')
        if mtime is not None and (isinstance(mtime, bool) or not isinstance(mtime, int)):
            raise TaskError(f"{what}: mtime {mtime!r} is no whole number of seconds since 1970")
        return SandboxFile(_content(what, given), mode=int(mode, 8), mtime=mtime)
    return SandboxFile(_content(what, {"content": value}))


def _content(what: str, given: Mapping[str, Any]) -> bytes:
    if "base64" in given:
        try:
            return base64.b64decode(given["base64"], validate=True)
        except (TypeError, ValueError, binascii.Error) as error:
            raise TaskError(f"{what}: is not base64 ({error})") from error
    match given["content"]:
        case str() as text:
            return text.encode("utf-8", "surrogatepass")
        case bytes() as content:
            return content
        case other:
            raise TaskError(f"{what}: {other!r} is no content; write text, or an object with base64")


def _workdir(given: Mapping[str, Any]) -> str:
    workdir = given.get("workdir", HOME)
    if not isinstance(workdir, str) or not re.fullmatch(r"/[\w./+@-]*", workdir):
        raise TaskError(f"workdir: {workdir!r} is no plain absolute path")
    return workdir


def _path(name: str, path: str, *, relative: bool = False) -> str:
    try:
        return clean_path(path, relative=relative)
    except ConfigError as error:
        raise TaskError(f"{name}: {error}") from error


def _setup(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("setup", [])
    commands = [value] if isinstance(value, str) else value
    if not isinstance(commands, Sequence) or not all(isinstance(command, str) for command in commands):
        raise TaskError(f"setup: {value!r} is no list of commands")
    return tuple(commands)


def _env(given: Mapping[str, Any]) -> dict[str, str]:
    env = _mapping(given, "env")
    for name, value in env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII) or not isinstance(value, str):
            raise TaskError(f"env: {name!r}: {value!r} is no environment variable with a text")
    return dict(env)


def _seconds(given: Mapping[str, Any], name: str, otherwise: float = DEFAULT_TIMEOUT_S) -> float:
    return check_seconds(name, given[name]) if name in given else otherwise
