"""Read tasks from rows: of JSONL and Parquet files, and of datasets on the Hugging Face hub.

    {"id": "count", "instruction": "How many lines has a.txt? Submit the number.",
     "files": {"a.txt": "1\\n2\\n"}, "tests": "grep -qx 2 /logs/agent/answer.txt && echo 1 > ..."}

docs/tasks.md lists the fields. A file with a row that cannot be a task is refused as a whole, before anything runs,
and every such row is named: a run on only the readable rows would be another run.
"""

from __future__ import annotations

import base64
import difflib
import json
import posixpath
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from backtalk.errors import ConfigError, DataError, TaskError
from backtalk.language.openai_chat import content_text
from backtalk.parquet import parquet_rows
from backtalk.sandboxes.base import HOME, SandboxFile
from backtalk.sandboxes.bubblewrap.layers import USR_SRC
from backtalk.sandboxes.files import clean_path
from backtalk.sandboxes.images.commands import is_program_path
from backtalk.tasks.folder import DEFAULT_TIMEOUT_S, read_harbor_task
from backtalk.tasks.needs import add_needs, texts_of
from backtalk.tasks.scripts import make_tests_offline
from backtalk.tasks.services import refuse_services
from backtalk.tasks.task import Task

SUFFIXES = (".jsonl", ".parquet")
MAX_REASONS = 20  # of bad rows that are spelled out; the others are named by number


def read_row_file(path: str | Path, *, host_packages: bool = False, world_model_only: bool = False) -> list[Task]:
    """Read the tasks in one .jsonl or .parquet file, one a row, in its order.

    Raises:
        TaskError: some row is no task; the message names every such row, and the field that is wrong.
        DataError: the file cannot be read at all.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        try:
            lines = enumerate(path.read_bytes().decode().split("\n"), 1)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error}); write one JSON object a line") from error
        rows: Iterable[tuple[str, Any]] = ((f"line {number}", line) for number, line in lines if line.strip())
    else:
        rows = ((f"row {number}", row) for number, row in enumerate(parquet_rows(path)))
    return _read_rows(str(path), rows, path.parent, host_packages, world_model_only)


def read_hub(source: str, *, world_model_only: bool = False) -> list[Task]:
    """Read the tasks in a dataset of the Hugging Face hub, or in a folder that ``datasets`` can load.

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
    return _read_rows(source, numbered, None, False, world_model_only)


def _read_rows(
    source: str, rows: Iterable[tuple[str, Any]], folder: Path | None, host_packages: bool, world_model_only: bool
) -> list[Task]:
    """Read rows, given with their places ("line 3"); ``folder`` is where their task folders are looked for."""
    tasks: dict[str, Task] = {}
    places: dict[str, str] = {}
    errors: dict[str, str] = {}
    for place, row in rows:
        try:
            task = _read_row(row, folder, host_packages, world_model_only)
            if task.id in tasks:
                raise TaskError(f"id: {task.id!r} is the id of {places[task.id]} too; rename one")
            tasks[task.id], places[task.id] = task, place
        except TaskError as error:
            errors[place] = str(error)
        except RecursionError:
            errors[place] = "is nested too deeply to be read"
    if errors:
        reasons = [f"{place}: {reason}" for place, reason in list(errors.items())[:MAX_REASONS]]
        if rest := list(errors)[MAX_REASONS:]:
            reasons.append(f"and {', '.join(rest)}")
        count = len(errors) + len(tasks)
        raise TaskError(f"{len(errors)} of {count} rows of {source} cannot be tasks:\n" + "\n".join(reasons))
    if not tasks:
        raise TaskError(f"{source} has no row; write one task a row, with the fields id, instruction and tests")
    return list(tasks.values())


def _without_nulls(value: Any) -> Any:
    """Return a copy in which no object has a field that is null, at any depth; lists keep theirs."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parse_object(value: Any) -> Any:
    """Parse an object that is given as a text of JSON, as in datasets whose rows have different fields."""
    return _without_nulls(json.loads(value)) if isinstance(value, str) else value


def _unpacked(value: Any) -> Any:
    """Parse a text that is an object or a list in JSON; return any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return _without_nulls(json.loads(value))
        except ValueError:  # a script may begin so too
            return value
    return value


def _parse_instruction(value: Any) -> Any:
    """Return an instruction that is given as parts of a message, or as messages, as one text."""
    given = _unpacked(value)
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        return value
    if given and all({"role", "from"} & item.keys() for item in given):
        if any(item.get("role", item.get("from")) not in ("system", "user", "human") for item in given):
            raise ValueError("messages of an instruction are the system's and the user's")
        return "\n\n".join(content_text(item.get("content", item.get("value"))) for item in given)
    return content_text(given) if all("type" in item for item in given) else value


def _parse_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _parse_env(value: Any) -> Any:
    """Return variables; a number is the text of it."""
    found = _parse_object(value)
    if not isinstance(found, dict):
        return found
    return {name: str(text) if type(text) in (int, float) else text for name, text in found.items()}


def _parse_files(value: Any, script: str = "") -> Any:
    """Return files by path; a text is the file ``script``, and a list holds objects with path and content."""
    value = _unpacked(value)
    if isinstance(value, str) and script:
        return {script: {"content": value, "mode": "755"}}
    if not isinstance(value, list):
        return _parse_object(value)
    if any(not isinstance(file, dict) or not isinstance(file.get("path"), str) for file in value):
        raise ValueError("an entry has no path; write {path, content} for each file")
    files = {file["path"]: {key: inner for key, inner in file.items() if key != "path"} for file in value}
    if len(files) < len(value):
        raise ValueError("two entries have one path; leave one out")
    return files


def _parse_list(value: Any) -> Any:
    value = _unpacked(value)
    return [value] if isinstance(value, str) else value


class _File(BaseModel):
    """A file as a row holds it: a text, or an object with content or base64."""

    model_config = ConfigDict(strict=True, extra="forbid")

    content: bytes
    mode: str = Field("644", pattern="^[0-7]{3,4}$")
    mtime: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        fields = value if isinstance(value, dict) else {"content": value}
        match fields:
            case {"base64": str() | bytes() as text, **rest} if "content" not in rest:
                return {**rest, "content": base64.b64decode(text, validate=True)}
            case {"content": str() as text}:
                return {**fields, "content": text.encode("utf-8", "surrogatepass")}
        return fields

    def build(self) -> SandboxFile:
        return SandboxFile(self.content, mode=int(self.mode, 8), mtime=self.mtime)


_Text = Annotated[str, Field(pattern=r"\S")]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_parse_number)]
_Variable = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")]
_Files = dict[str, Annotated[_File, AfterValidator(_File.build)]]
_Object = BeforeValidator(_parse_object)


class _Row(BaseModel):
    """The known fields of a row. The text under a field says what to write where its value is refused.

    Defaults stand for fields that are not there; ``Task`` has the real ones.
    """

    model_config = ConfigDict(strict=True, use_attribute_docstrings=True)

    id: Annotated[_Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = ""
    """a text or a whole number that no other task has"""
    instruction: Annotated[_Text, BeforeValidator(_parse_instruction)] = ""
    """the task, in words for the agent"""
    folder: _Text = ""
    """the path of a task folder, from where the file of rows lies"""
    files: Annotated[_Files, BeforeValidator(_parse_files)] = {}
    """texts by path, or objects with content or base64, mode such as "755", mtime in seconds since 1970"""
    tests: Annotated[_Files, BeforeValidator(partial(_parse_files, script="test.sh"))] = {}
    """the script test.sh, or files by path as in files"""
    solution: Annotated[_Files, BeforeValidator(partial(_parse_files, script="solve.sh"))] = {}
    """the script solve.sh, or files by path as in files"""
    setup: Annotated[list[str], BeforeValidator(_parse_list), AfterValidator(tuple)] = []
    """a list of commands"""
    env: Annotated[dict[_Variable, str], BeforeValidator(_parse_env)] = {}
    """environment variables, texts by name"""
    workdir: str = Field(HOME, pattern=r"^/[\w./+@-]*$")
    """a plain absolute path"""
    agent_timeout_s: _Seconds = 0
    """seconds above 0"""
    verifier_timeout_s: _Seconds = 0
    """seconds above 0"""
    metadata: Annotated[dict[str, Any], _Object] = {}
    """an object"""
    world_model_only: bool = False
    """true or false"""


def _check_row(row: Any) -> _Row:
    """Check the fields of a row; those that are not known go to its metadata, unless they are nearly a known one."""
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise TaskError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise TaskError(f"holds a {type(row).__name__}, not an object with fields such as id and instruction")
    given = _without_nulls(row)  # Parquet and datasets fill in what is not there
    other = {name: given.pop(name) for name in list(given) if name not in _Row.model_fields}
    for name in other:
        if near := difflib.get_close_matches(name, _Row.model_fields, n=1, cutoff=0.8):
            raise TaskError(f"{name}: is no field; did you mean {near[0]!r}? A field of your own goes into metadata")
    try:
        checked = _Row.model_validate(given)
    except ValidationError as error:
        reasons = []
        for mistake in error.errors(include_url=False):
            field = str(mistake["loc"][0])
            place = ": ".join(str(part) for part in mistake["loc"] if part != "[key]")
            hint = _Row.model_fields[field].description
            reasons.append(f"{place}: {mistake['input']!r:.200} cannot be used ({mistake['msg']}); write {hint}")
        raise TaskError("; ".join(reasons)) from error
    if "world_model_only" in given:
        other["world_model_only"] = checked.world_model_only
    checked.metadata |= other
    return checked


def _read_row(row: Any, folder: Path | None, host_packages: bool, world_model_only: bool) -> Task:
    """Read the task of a row. Where it names a task folder, the row's own fields override the folder's."""
    checked = _check_row(row)
    if world_model_only:
        checked.metadata["world_model_only"] = True
    given = checked.model_fields_set
    own: dict[str, Any] = {
        name: getattr(checked, name) for name in given - {"folder", "world_model_only"} | {"metadata"}
    }
    if "folder" in given:
        if folder is None:
            raise TaskError("folder: a dataset of the hub cannot name folders of this machine; put files inline")
        if both := sorted(given & {"files", "tests", "solution", "setup", "env", "workdir"}):
            raise TaskError(f"folder: {', '.join(both)} are in the row and in the folder; keep one of the two")
        path = folder / checked.folder
        if not path.is_dir():
            raise TaskError(f"folder: there is no folder {path}; the path begins where the file of rows lies")
        unscored = checked.metadata.get("world_model_only") is True
        task = read_harbor_task(path, host_packages=host_packages, world_model_only=unscored)
        return replace(task, **own | {"metadata": {**task.metadata, **checked.metadata}})
    for name in ("id", "instruction"):
        if name not in given:
            raise TaskError(f"{name}: is missing; every task needs one")
    for part in ("files", "tests", "solution"):
        base = checked.workdir if part == "files" else ""
        files = getattr(checked, part).items()
        try:
            own[part] = {clean_path(posixpath.join(base, path), relative=not base): file for path, file in files}
            if base and (wrong := [path for path in own[part] if is_program_path(path) or path.startswith(USR_SRC)]):
                raise TaskError(f"{part}: {wrong[0]} is among this machine's own programs; use /opt")
        except ConfigError as error:
            raise TaskError(f"{part}: {error}") from error
    own.setdefault("verifier_timeout_s", DEFAULT_TIMEOUT_S)
    task = Task(**own)
    if task.world_model_only:
        return task
    if "test.sh" not in task.tests:
        raise TaskError("tests: there is no test.sh to score the task; give the script, or world_model_only: true")
    refuse_services("tests", task.tests, task.metadata)
    tests, notes = make_tests_offline(Path("tests"), task.tests, host_packages)
    metadata = dict(task.metadata) | ({"world_notes": notes} if notes else {})
    add_needs(metadata, task.tests, [task.instruction, *task.setup, *texts_of({**task.solution, **task.files})])
    return replace(task, tests=tests, metadata=metadata)
