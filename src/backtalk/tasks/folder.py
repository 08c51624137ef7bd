"""Read and write tasks as folders in the format of Harbor (harborframework.com).

    task.toml  instruction.md  environment/Dockerfile  tests/test.sh  solution/solve.sh

Old and new schemas are read. Keys that have no effect here are kept in ``metadata["harbor"]`` and written back to
their places; ``metadata["world_notes"]`` lists what differs here from what the folder asks for. A task that would not
be the same task without what it asks for is refused. docs/tasks.md lists all of this.
"""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from backtalk.errors import ConfigError, TaskError
from backtalk.sandboxes.base import HOME, SandboxFile
from backtalk.sandboxes.files import clean_path
from backtalk.sandboxes.images.commands import PASS_HOST_PACKAGES
from backtalk.sandboxes.images.start_state import ONE_USER, StartState, read_dockerfile, read_tree
from backtalk.tasks.needs import add_needs, texts_of
from backtalk.tasks.scripts import make_tests_offline
from backtalk.tasks.services import refuse_services
from backtalk.tasks.task import Task

SCHEMA_VERSION = "1.4"
DEFAULT_IMAGE = "python:3.11-slim-bookworm"  # written where a task names none; the sandbox never uses it
DEFAULT_TIMEOUT_S = 600.0  # Harbor's

_SHARED = "tests run in the agent's sandbox, after its processes have ended; take it out if the tests work there"
_BASH = "the agent has bash and submit, no other tools; take it out if the task can be done with those"
_SCRIPT = "a task is scored by its tests/test.sh alone; let that do it"
_NO_WATCH = (
    "nothing watches a sandbox; start what it waits for in a RUN line, and again in tests/test.sh, and take it out"
)
# Keys of task.toml that a sandbox cannot serve: values that are harmless, and the reason with what to do.
_REFUSED: Mapping[tuple[str, str], tuple[tuple[object, ...], str]] = {
    ("agent", "user"): (("root", 0), ONE_USER),
    ("verifier", "user"): (("root", 0), ONE_USER),
    ("verifier", "env"): ((), "tests get the environment's variables; put them under [environment.env]"),
    ("verifier", "environment"): ((), _SHARED),
    ("verifier", "environment_mode"): (("shared",), _SHARED),
    ("verifier", "import_path"): ((), _SCRIPT),
    ("verifier", "collect"): ((), _SCRIPT),
    ("environment", "gpus"): ((), "a sandbox has no GPU; set it to 0 if the task can be done without"),
    ("environment", "os"): (("linux",), "a sandbox is Linux"),
    ("environment", "mcp_servers"): ((), _BASH),
    ("environment", "skills_dir"): ((), _BASH),
    ("environment", "healthcheck"): ((), _NO_WATCH),
}
_TERMINAL_BENCH = ("task.yaml", "run-tests.sh")  # files of Terminal-Bench's own format, before it took Harbor's
# Lines at the top that tell crawlers to keep benchmark files out of training data.
_CANARY = re.compile(r"\A(?:[^\S\n]*(?:<!--.*canary.*-->|#.*canary.*)[^\S\n]*(?:\n|\Z))+", re.IGNORECASE)


def read_harbor_task(path: str | Path, *, host_packages: bool = False, world_model_only: bool = False) -> Task:
    """Read one task folder.

    ``host_packages=True`` leaves out commands of package managers in RUN lines and in the tests' scripts, and accepts
    a task that has only a ready-made image: the user promises that this machine has what the task needs.
    ``world_model_only=True`` marks the task as not scored; it then needs no tests.

    Raises:
        TaskError: a file is missing, or the task asks for what a sandbox cannot serve.
    """
    folder = Path(path)
    _demand(folder, "task.toml")
    toml = _read_toml(folder / "task.toml")
    _refuse(folder, toml)
    _demand(folder, "instruction.md")
    metadata = toml["metadata"]
    if world_model_only:
        metadata["world_model_only"] = True
    is_scored = metadata.get("world_model_only") is not True
    if is_scored:
        _demand(folder, "tests/test.sh")
    own = metadata.pop("backtalk", None) or {}
    state = read_environment(
        folder / "environment", toml["environment"].get("docker_image"), host_packages=host_packages
    )
    if state.image is None and (left := sorted(path.name for path in (folder / "environment").glob("*"))):
        raise TaskError(f"{folder} has environment/{left[0]} but no environment/Dockerfile to COPY it; write one")
    instruction = _CANARY.sub("", _read_text(folder / "instruction.md"))
    if not instruction.strip():
        raise TaskError(f"{folder / 'instruction.md'} is empty; say what is to be done")
    name = toml["task"].pop("name", None)
    trees = {part: _read_part(folder, part, own.get("files", {})) for part in ("tests", "solution")}
    if is_scored:
        refuse_services(f"{folder}/tests", trees["tests"], metadata)
        texts = [instruction, *(command for _, command in state.setup), *texts_of(trees["solution"] | state.files)]
        add_needs(metadata, trees["tests"], texts, state.installs, state.needs, folder / "environment")
        trees["tests"], notes = make_tests_offline(
            folder / "tests", trees["tests"], host_packages, image_installs=bool(state.installs)
        )
        state.notes += notes
    workdir = toml["environment"].pop("workdir", None) or state.workdir
    if not str(workdir).startswith("/"):
        raise TaskError(f"{folder / 'task.toml'}: [environment] workdir = {workdir!r} is no absolute path")
    return Task(
        id=str(own.get("id") or name or folder.resolve().name),
        instruction=instruction,
        files=state.files,
        setup=state.commands(workdir),
        env=_read_env(folder, toml, state),
        workdir=workdir,
        tests=trees["tests"],
        solution=trees["solution"],
        agent_timeout_s=_read_seconds(folder, toml, "agent", math.inf),
        verifier_timeout_s=_read_seconds(folder, toml, "verifier", DEFAULT_TIMEOUT_S),
        metadata=_read_metadata(toml, state),
    )


def _demand(folder: Path, name: str) -> None:
    if (folder / name).is_file():
        return
    if old := [file for file in _TERMINAL_BENCH if (folder / file).is_file()]:
        raise TaskError(
            f"task folder {folder} has no {name} but a {old[0]}: it is in the older format of Terminal-Bench; write "
            "task.toml, instruction.md, environment/Dockerfile and tests/test.sh, as docs/tasks.md shows"
        )
    raise TaskError(f"task folder {folder} has no {name}; docs/tasks.md shows what belongs in one")


def write_harbor_task(task: Task, folder: str | Path) -> None:
    """Write a task as a folder that Harbor can run, and that ``read_harbor_task`` reads back as it was.

    Raises:
        TaskError: the folder is not empty, or something in the task has no place in the format.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise TaskError(f"{folder} is not empty; give a new folder")
    toml, dockerfile = _toml_of(task), _dockerfile_of(task)
    files = {path.removeprefix("/"): file for path, file in task.files.items()}
    for part, tree in (("environment/files", files), ("tests", task.tests), ("solution", task.solution)):
        for path, file in tree.items():
            try:
                place = folder / part / clean_path(path, relative=True)
            except ConfigError as error:
                raise TaskError(f"task {task.id!r}: {error}") from error
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.content)
            place.chmod(0o755 if file.mode & 0o100 else 0o644)
    (folder / "environment").mkdir(parents=True, exist_ok=True)
    (folder / "environment/Dockerfile").write_bytes(dockerfile.encode())
    (folder / "instruction.md").write_bytes(task.instruction.encode())
    (folder / "task.toml").write_bytes(toml.encode())


def load_harbor_tasks(
    source: str | Path,
    *,
    host_packages: bool = False,
    world_model_only: bool = False,
    on_refused: Callable[[Path, str], None] | None = None,
) -> list[Task]:
    """Read the task in a folder, or the tasks in the folders within it, by name; the options of ``read_harbor_task``.

    ``on_refused`` is called with each folder that cannot be read, and the reason; without it one refuses them all.

    Raises:
        TaskError: there is none, or none can be read, or, without ``on_refused``, some cannot; the message names each.
    """
    folders = find_harbor_folders(Path(source))
    return read_folders(
        folders, str(source), host_packages=host_packages, world_model_only=world_model_only, on_refused=on_refused
    )


def find_harbor_folders(folder: Path) -> list[Path]:
    """Return the folder itself where it is a task, else the task folders in it, by name.

    Raises:
        TaskError: there is none.
    """
    if (folder / "task.toml").is_file() or (folder / "instruction.md").is_file():
        return [folder]
    marks = ("task.toml", "instruction.md", *_TERMINAL_BENCH)
    found = [d for d in sorted(folder.iterdir()) if any((d / mark).exists() for mark in marks)]
    if not found:
        raise TaskError(f"{folder} holds no task folder (one with task.toml and instruction.md)")
    return found


def read_folders(
    folders: Sequence[Path],
    source: str,
    *,
    host_packages: bool,
    world_model_only: bool = False,
    on_refused: Callable[[Path, str], None] | None = None,
) -> list[Task]:
    """Read task folders, which ``source`` named; see ``load_harbor_tasks``."""
    tasks: list[Task] = []
    errors: dict[str, str] = {}
    for folder in folders:
        try:
            tasks.append(read_harbor_task(folder, host_packages=host_packages, world_model_only=world_model_only))
        except TaskError as error:
            errors[folder.name] = str(error)
            if len(folders) == 1:
                raise
            if on_refused is not None:
                on_refused(folder, str(error))
    if errors and (on_refused is None or not tasks):
        reasons = "\n".join(list(errors.values())[:3])
        names = " ".join(errors)
        advice = "" if on_refused else "\nTo go on without them: --on-refuse skip (on_refuse: skip of the source)"
        raise TaskError(
            f"{len(errors)} of {len(folders)} tasks in {source} cannot run:\n{reasons}\nAll: {names}{advice}"
        )
    return tasks


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text: {error}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    """Read a task.toml, with an empty table for each section that it leaves out."""
    try:
        toml = tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"{path} is not TOML: {error}") from error
    for section in ("task", "metadata", "agent", "verifier", "environment", "solution"):
        if not isinstance(toml.setdefault(section, {}), dict):
            raise TaskError(f"{path}: {section} is {toml[section]!r}, and has to be a table, [{section}]")
    toml.pop("version", None)
    toml.pop("schema_version", None)
    return toml


def _refuse(folder: Path, toml: Mapping[str, Any]) -> None:
    if toml.get("steps"):
        raise TaskError(f"{folder}: a task of several [[steps]] cannot run here; make each step a task of its own")
    if (folder / "trajectory.json").exists():
        raise TaskError(f"{folder}: trajectory.json is a conversation to go on with; a task here begins at its start")
    for (section, key), (harmless, why) in _REFUSED.items():
        value = toml[section].get(key)
        if value and value not in harmless:
            raise TaskError(f"{folder / 'task.toml'}: [{section}] {key} = {value!r} is not possible here: {why}")


def read_environment(folder: Path, image: str | None, *, host_packages: bool) -> StartState:
    """Read what a task starts from: its folder ``environment``, and the ready-made image that it names, if any.

    Raises:
        TaskError: it needs several machines, or an image without a Dockerfile.
    """
    for name in ("docker-compose.yaml", "docker-compose.yml"):
        if (folder / name).exists():
            raise TaskError(
                f"{folder / name} asks for several machines, and a sandbox is one; start what its other services do in "
                "RUN lines of the Dockerfile for the agent, and again in tests/test.sh for the tests, and remove it"
            )
    if (folder / "Dockerfile").is_file():
        return read_dockerfile(folder, host_packages=host_packages)
    if image and not host_packages:
        raise TaskError(
            f"{folder} has no Dockerfile, only the ready-made image {image!r}, which cannot be opened here; write the "
            f"Dockerfile, or {PASS_HOST_PACKAGES} if nothing in that image matters"
        )
    notes = [f"no Dockerfile: this machine stands in for the image {image}"] if image else []
    return StartState(workdir=HOME, notes=notes)


def _read_part(folder: Path, part: str, states: Mapping[str, Any]) -> dict[str, SandboxFile]:
    """Read the files of tests or solution; ``states`` holds the modes and times that a checkout loses."""
    files = {}
    for path, file in read_tree(folder / part).items():
        state = states.get(f"{part}/{path}", {})
        mode = int(state["mode"], 8) if "mode" in state else file.mode
        files[path] = SandboxFile(file.content, mode=mode, mtime=state.get("mtime"))
    return files


def _read_seconds(folder: Path, toml: dict[str, Any], section: str, default: float) -> float:
    value = toml[section].pop("timeout_sec", None)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise TaskError(
            f"{folder / 'task.toml'}: [{section}] timeout_sec = {value!r} is no number of seconds above 0; write one"
        )
    return float(value)


def _read_env(folder: Path, toml: dict[str, Any], state: StartState) -> dict[str, str]:
    env = toml["environment"].pop("env", None) or {}
    for name, value in env.items():
        if "${" in str(value):
            raise TaskError(
                f"{folder / 'task.toml'}: [environment.env] {name} = {value!r} asks for a secret of this machine, and "
                "a sandbox gets none; write the value itself"
            )
    env = state.env | {name: str(value) for name, value in env.items()}
    for name in env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
            raise TaskError(f"{folder}: {name!r} cannot be the name of an environment variable")
    return env


def _read_metadata(toml: dict[str, Any], state: StartState) -> dict[str, Any]:
    """Return the metadata of a task: its own, the keys that have no effect, and notes of what is different here."""
    environment, metadata, notes = toml["environment"], toml.pop("metadata"), list(state.notes)
    asked = [f"{key} = {environment[key]}" for key in ("allow_internet", "network_mode") if environment.get(key)]
    if asked and asked != ["network_mode = no-network"]:
        notes.append(f"{asked[0]}: runs offline all the same")
    sizes = [key for key in ("memory", "memory_mb", "storage", "storage_mb") if key in environment]
    if sizes:
        notes.append(f"{', '.join(f'{key} = {environment[key]}' for key in sizes)}: the run's own limits hold")
    if environment.get("network_mode") == "no-network":
        del environment["network_mode"]
    if kept := _without_empty(toml):
        metadata["harbor"] = kept
    if state.image and state.image != DEFAULT_IMAGE:
        metadata["base_image"] = state.image
    known = metadata.get("world_notes", [])
    if new := [note for note in notes if note not in known]:
        metadata["world_notes"] = [*known, *new]
    return metadata


def _without_empty(table: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in kept.items() if value not in ({}, [])}


def _dockerfile_of(task: Task) -> str:
    lines = [f"FROM {task.metadata.get('base_image', DEFAULT_IMAGE)}", 'SHELL ["/bin/bash", "-ec"]']
    if not re.fullmatch(r"/[\w./+@-]*", task.workdir):
        raise TaskError(f"task {task.id!r} has workdir {task.workdir!r}; a plain absolute path is needed")
    lines.append(f"WORKDIR {task.workdir}")
    for name, value in task.env.items():
        if "\n" not in value:  # which a Dockerfile cannot hold: those go into task.toml
            escaped = re.sub(r'(["\\$])', r"\\\1", value)
            lines.append(f'ENV {name}="{escaped}"')
    if task.files:
        lines.append("COPY files/ /")
    modes: dict[str, list[str]] = {}
    for path, file in task.files.items():
        if not path.startswith("/") or "\n" in path:
            raise TaskError(f"task {task.id!r} has a file at {path!r}; an absolute path on one line is needed")
        if file.mode not in (0o644, 0o755):
            modes.setdefault(f"chmod {file.mode:03o}", []).append(shlex.quote(path))
        if file.mtime is not None:
            modes.setdefault(f"touch -d @{file.mtime}", []).append(shlex.quote(path))
    if modes:
        lines.append("RUN " + " && \\\n    ".join(f"{what} {' '.join(paths)}" for what, paths in modes.items()))
    for command in task.setup:
        mark = "END_OF_SETUP"
        while mark in command:
            mark += "_"
        lines.append(f"RUN <<'{mark}'\n{command}\n{mark}")
    return "\n".join(lines) + "\n"


def _toml_of(task: Task) -> str:
    metadata = dict(task.metadata)
    toml: dict[str, Any] = dict(metadata.pop("harbor", {}))
    states = {
        f"{part}/{path}": {"mode": f"{file.mode:03o}"} | ({} if file.mtime is None else {"mtime": file.mtime})
        for part, tree in (("tests", task.tests), ("solution", task.solution))
        for path, file in tree.items()
        if file.mtime is not None or file.mode not in (0o644, 0o755)
    }
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", task.id, flags=re.ASCII)
    name = task.id if is_name else "backtalk/" + re.sub(r"[^\w.-]", "-", task.id, flags=re.ASCII)
    long_env = {name: value for name, value in task.env.items() if "\n" in value}
    toml["schema_version"] = SCHEMA_VERSION
    toml["task"] = {"name": name} | toml.get("task", {})
    if math.isfinite(task.agent_timeout_s):
        toml["agent"] = toml.get("agent", {}) | {"timeout_sec": task.agent_timeout_s}
    toml["verifier"] = toml.get("verifier", {}) | {"timeout_sec": task.verifier_timeout_s}
    environment = toml.get("environment", {})
    network = {} if {"allow_internet", "network_mode"} & set(environment) else {"network_mode": "no-network"}
    toml["environment"] = environment | network | ({"env": long_env} if long_env else {})
    toml["metadata"] = metadata | {"backtalk": {"id": task.id} | ({"files": states} if states else {})}
    try:
        return tomli_w.dumps(toml)
    except TypeError as error:
        raise TaskError(f"metadata of task {task.id!r} cannot be written as TOML: {error}") from error
