"""Derive how a task's world starts from its Dockerfile where no root is chosen: files and commands over this machine.

The plan is the one that a root is built from (`plan`). There is no image here, though: a sandbox shows this
machine's own /usr, read-only, has no network, and one ordinary user who owns every file. So here, and not in a root,

    FROM        is noted; several stages are refused
    COPY, ADD   put plain files where they belong before anything runs, or in their turn where a command ran before;
                archives, links to folders and places among this machine's programs are refused
    RUN         is run by ``bash -e``. What package managers do is refused, or left out where this machine has the
                packages (``host_packages``); what fetches is refused; so is making users, unless its failure is
                allowed for by ``||``
    USER        may name root, which stands for the one user
    SHELL       may name sh and bash
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from backtalk.errors import ConfigError, TaskError
from backtalk.sandboxes.base import DEFAULT_PATH, SandboxFile
from backtalk.sandboxes.images.plan import COPY_SCRIPT, Copy, Run, Shell, Source, Step, User, Workdir, read_plan
from backtalk.sandboxes.images.shellwords import split_list
from backtalk.sandboxes.root import PROGRAM_FOLDERS

_PACKAGES = re.compile(r"(?:\w+=\S+\s+)*(?:apt-get|apt|apk|yum|dnf|npm|pip3?|python3?\s+-m\s+pip|uv\s+pip|conda)\s")
_AFTER_PACKAGES = re.compile(r"(?:rm\s+-rf\s+/var/lib/apt/lists/?\*?|ln\s+-sf?\s+/usr/bin/python3\s+/usr/bin/python)$")
_NETWORK = re.compile(r"\b(?:curl|wget|git\s+clone)\b.*\bhttps?://(?!localhost|127\.)")
_FILE_STATE = re.compile(r"(chmod) ([0-7]{3,4}) (.+)|(touch) -d @(-?\d+) (.+)")
_MAKES_USERS = re.compile(r"(?:useradd|adduser|usermod|userdel|groupadd|addgroup|groupmod|chpasswd|passwd)\s")
_ONE_USER = "a sandbox has one ordinary user; take it out if the task does not depend on who works"
_IN_EVERY_IMAGE = ("/", "/etc", "/home", "/mnt", "/opt", "/root", "/srv", "/tmp", "/var")


@dataclass
class World:
    """The files, commands and variables with which a task starts. Grows while the plan is read."""

    folder: Path = Path()
    host_packages: bool = False
    image: str | None = None
    files: dict[str, SandboxFile] = field(default_factory=dict)
    setup: list[tuple[str, str]] = field(default_factory=list)  # (folder, command)
    ran: bool = False  # a command ran that may have touched any file
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    folders: set[str] = field(default_factory=lambda: {*_IN_EVERY_IMAGE})  # known, which decides what COPY x /y means
    notes: list[str] = field(default_factory=list)
    installs: list[str] = field(default_factory=list)  # commands left out, because this machine has what they install

    def commands(self, workdir: str) -> tuple[str, ...]:
        """Return the setup as a task has it whose commands start in ``workdir``."""
        setup = list(self.setup)
        if setup and not _is_below(workdir, self.workdir):
            setup.insert(0, ("/", f"mkdir -p {shlex.quote(self.workdir)}"))
        return tuple(command if at == workdir else f"cd {shlex.quote(at)}\n{command}" for at, command in setup)


def read_dockerfile(folder: Path, *, host_packages: bool) -> World:
    """Read ``folder``/Dockerfile.

    Raises:
        TaskError: an instruction that the sandbox cannot carry out, with its line and the reason.
    """
    path = folder / "Dockerfile"
    try:
        plan = read_plan(path)
    except ConfigError as error:
        raise TaskError(str(error)) from error
    if len(plan.stages) > 1:
        raise TaskError(
            f"{path}, line {plan.last.line}: FROM: a build in several stages cannot run here; copy what the last stage "
            "needs"
        )
    world = World(folder, host_packages, plan.last.image, env=plan.last.env, workdir=plan.last.workdir)
    for step in plan.last.steps:
        try:
            _carry_out(world, step)
        except (TaskError, ValueError) as error:  # ValueError: shlex
            raise TaskError(f"{path}, line {step.line}: {step.keyword}: {error}") from error
    return world


def read_file(path: Path, root: Path) -> SandboxFile:
    """Read a regular file below ``root``; links are followed as long as they stay below it.

    Only whether its owner may run it is taken of its mode, as git does: the rest depends on who checked it out.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise TaskError(f"{path} leads out of {root}; copy what it points at into the task's folder")
    if not path.is_file():
        raise TaskError(f"{path} is no regular file; a task's folder holds files and folders only")
    return SandboxFile(path.read_bytes(), mode=0o755 if path.stat().st_mode & 0o100 else 0o644)


def read_tree(folder: Path, root: Path | None = None) -> dict[str, SandboxFile]:
    """Read every file below ``folder``, by its path from there."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.is_file():
            raise TaskError(f"{path} is a link to a folder or to nothing; put the files themselves there")
        if not path.is_dir():
            files[path.relative_to(folder).as_posix()] = read_file(path, root or folder)
    return files


def _carry_out(world: World, step: Step) -> None:
    match step:
        case Workdir(path=path):
            if path not in world.folders and not _is_below(world.workdir, path):
                world.setup.append(("/", f"mkdir -p {shlex.quote(path)}"))
            world.folders.add(path)
        case User(name=name) if not step.is_root:
            raise TaskError(f"{name!r} cannot be carried out: {_ONE_USER}")
        case Shell(words=words) if posixpath.basename(words[0]) not in ("sh", "bash"):
            raise TaskError(f"commands are run by bash, and {' '.join(words)} is another shell")
        case Copy():
            _copy(world, step)
        case Run():
            _run(world, step)


def _copy(world: World, copy: Copy) -> None:
    trees = [(source, _read_source(world, source, copy.mode)) for source in copy.sources]
    if copy.to.split("/")[1] in PROGRAM_FOLDERS:
        raise TaskError(f"{copy.to} is among this machine's own programs, which a sandbox cannot change; use /opt")
    if world.ran:  # a command may have made any folder: what the destination means is seen when its turn comes
        stage = f"/.copy-{copy.line}"
        for source, tree in trees:
            world.files |= {f"{stage}/{source.name}/{path}".rstrip("/"): file for path, file in tree}
        folders = shlex.join(["mkdir", "-p", *(f"{stage}/{s.name}" for s, _ in trees if s.kind == "d"), stage])
        words = shlex.join([stage, *copy.arguments])
        world.setup.append(("/", f"{folders}\nset -- {words}\n{COPY_SCRIPT}rm -rf {stage}"))
        return
    to = copy.to if copy.to == "/" else copy.to.rstrip("/")
    for source, tree in trees:
        is_folder = len(trees) > 1 or copy.to.endswith("/") or to in world.folders
        name = posixpath.basename(source.name) if source.kind == "f" and is_folder else ""
        placed = {posixpath.join(to, name or path).rstrip("/"): file for path, file in tree}
        world.files |= placed
        world.folders |= {parent for place in placed for parent in _parents(place)}


def _read_source(world: World, source: Source, mode: int | None) -> list[tuple[str, SandboxFile]]:
    """Read the files of one source of a COPY, by their path below it; a file's own path is empty."""
    if source.kind == "a":
        raise TaskError(f"ADD {posixpath.basename(source.name)} fetches or unpacks; put the files there and use COPY")
    if source.path is None:
        files = {"": SandboxFile(source.text.encode())}
    elif source.kind == "d":
        files = read_tree(source.path, world.folder)
    else:
        files = {"": read_file(source.path, world.folder)}
    return [(path, file if mode is None else replace(file, mode=mode)) for path, file in files.items()]


def _run(world: World, run: Run) -> None:
    command, outside = run.command, run.outside
    if run.is_script:
        command = outside = command.removesuffix("\n")
        first = command.partition("\n")[0]
        if first.startswith("#!") and not re.search(r"\b(ba)?sh\b", first):
            raise TaskError(f"{first} is not bash; write the script to a file with COPY and run that")
    elif run.words:
        command = outside = shlex.join(run.words)
    elif _set_file_states(world, command):
        return
    # A heredoc that is not the script itself is some file's content: what it says is not run here.
    parts = split_list(outside) if "\n" not in outside else [("", line.strip()) for line in outside.split("\n")]
    kept = _without_packages(world, command, parts)
    if kept is None:
        return
    if _NETWORK.search(outside):
        raise TaskError(f"{kept[:200]!r} needs the network, and a sandbox has none; put the files there with COPY")
    if found := [part for _, part in parts if _MAKES_USERS.match(part) and "||" not in part]:
        raise TaskError(f"{found[0]!r} makes or changes users, and {_ONE_USER}, or let it fail: {found[0]} || true")
    if run.before:
        world.notes.append(f"a sandbox's one user owns every file: chown and chgrp do nothing in {outside[:200]}")
    if re.fullmatch(r"mkdir -p( [\w./-]+)+", kept):
        world.folders |= {posixpath.normpath(posixpath.join(run.workdir, word)) for word in kept.split()[2:]}
    else:
        world.ran = True
    world.setup.append((run.workdir, _state(world, run) + run.before + kept))


def _state(world: World, run: Run) -> str:
    """Return what sets a command's variables and options where they are not those that the task starts with."""
    given = {**run.args, **run.env}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in given.items() if world.env.get(name) != value]
    for name in world.env.keys() - given.keys():  # a later ENV sets it
        lines.append(f"export PATH={DEFAULT_PATH}\n" if name == "PATH" else f"unset {name}\n")
    options = [re.sub(r"^-\w+", lambda found: re.sub("[cil]", "", found.group()), word) for word in run.shell[1:]]
    if options := [word for word in options if word not in ("-", "-e")]:
        lines.append(f"set {shlex.join(options)}\n")
    return "".join(lines)


def _set_file_states(world: World, command: str) -> bool:
    """Take ``chmod 600 FILES`` and ``touch -d @SECONDS FILES`` of copied files as their state: no command is needed."""
    changed = dict(world.files)
    for _, part in split_list(command):
        match = _FILE_STATE.fullmatch(part)
        paths = shlex.split(match.group(3) or match.group(6)) if match else []
        if not match or world.ran or any(path not in changed for path in paths):
            return False
        for path in paths:
            state = {"mode": int(match.group(2), 8)} if match.group(1) else {"mtime": int(match.group(5))}
            changed[path] = replace(changed[path], **state)
    world.files = changed
    return True


def _without_packages(world: World, command: str, parts: list[tuple[str, str]]) -> str | None:
    """Return the command without what package managers do, which cannot run offline; None where nothing is left."""
    packages = [part for _, part in parts if _PACKAGES.match(part)]
    if not packages:
        return command
    if not world.host_packages:
        raise TaskError(
            f"{packages[0]!r} needs the network, and a sandbox has none; install the packages on this machine, then "
            "read the task with host_packages=True, and the line is left out"
        )
    if "\n" in command:
        raise TaskError(f"{packages[0]!r} stands in a script; give it a RUN line of its own, to be left out")
    world.installs += packages
    world.notes += [f"left out, this machine's packages are used: {part}" for part in packages]
    kept = [(before, part) for before, part in parts if not _PACKAGES.match(part) and not _AFTER_PACKAGES.match(part)]
    return "".join(part if not at else f" {before} {part}" for at, (before, part) in enumerate(kept)) or None


def _is_below(path: str, folder: str) -> bool:
    """Tell whether ``path`` is ``folder`` or lies below it, so that making it makes the folder."""
    return folder == "/" or f"{path}/".startswith(f"{folder}/")


def _parents(path: str) -> Iterator[str]:
    while path != "/":
        path = posixpath.dirname(path)
        yield path
