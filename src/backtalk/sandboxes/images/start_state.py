"""Derive from a Dockerfile the files and commands with which a task starts over this machine's own programs.

The plan is the one that a root is built from (`plan`). Without a root, though, a sandbox shows this machine's own /usr,
read-only, has no network, and one ordinary user who owns every file. So here, and not in a root,

    FROM        is noted; several stages are refused
    COPY, ADD   write plain files before anything runs, or in their turn if a command ran before;
                archives, links to folders and paths among this machine's programs are refused
    RUN         is run by ``bash -e``. Package managers are refused, or left out if this machine has the packages
                (``host_packages``); downloads are refused; so are writes among this machine's programs. Users that it
                makes are names of the one user (`users`)
    USER        names the one user, who is root in name until then
    SHELL       may name sh and bash
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from backtalk.errors import ConfigError, TaskError
from backtalk.sandboxes.base import DEFAULT_PATH, SandboxFile
from backtalk.sandboxes.images.commands import (
    PACKAGES,
    PASS_HOST_PACKAGES,
    PYTHON_LINK,
    WHY_NOT_THERE,
    is_program_path,
    program_written_to,
    with_host_packages,
    writable_program_folders,
)
from backtalk.sandboxes.images.plan import COPY_SCRIPT, Copy, Run, Shell, Source, Step, User, Workdir, read_plan
from backtalk.sandboxes.images.shellwords import split_list
from backtalk.sandboxes.images.users import PASSWD, Users

_AFTER_PACKAGES = re.compile(r"rm\s+-rf\s+/var/lib/apt/lists/?\*?$")
_NETWORK = re.compile(r"\b(?:curl|wget|git\s+clone)\b.*\bhttps?://(?!localhost|127\.)")
_FILE_STATE = re.compile(r"(chmod) ([0-7]{3,4}) (.+)|(touch) -d @(-?\d+) (.+)")
ONE_USER = "a sandbox has one ordinary user; leave it out if the task does not depend on the user"
_IN_EVERY_IMAGE = ("/", "/etc", "/home", "/mnt", "/opt", "/root", "/srv", "/tmp", "/var")


@dataclass
class StartState:
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
    needs: list[str] = field(default_factory=list)  # commands that the image would have, and this machine has to have
    users: Users = field(default_factory=Users)

    def commands(self, workdir: str) -> tuple[str, ...]:
        """Return the setup commands of a task whose commands start in ``workdir``."""
        setup = list(self.setup)
        made = [] if _is_below(workdir, self.workdir) else [self.workdir]
        if made := list(dict.fromkeys([*self.users.to_make, *made])):
            setup.insert(0, ("/", shlex.join(["mkdir", "-p", *made])))
        return tuple(command if at == workdir else f"cd {shlex.quote(at)}\n{command}" for at, command in setup)


def read_dockerfile(folder: Path, *, host_packages: bool) -> StartState:
    """Read ``folder``/Dockerfile and return how the task starts.

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
    state = StartState(folder, host_packages, plan.last.image, env=plan.last.env, workdir=plan.last.workdir)
    for step in plan.last.steps:
        try:
            _carry_out(state, step)
        except (TaskError, ValueError) as error:  # ValueError: shlex
            raise TaskError(f"{path}, line {step.line}: {step.keyword}: {error}") from error
    _settle_users(state, plan.last.steps)
    return state


def _settle_users(state: StartState, steps: Sequence[Step]) -> None:
    """Add the tables of users, and the variables of the user whom the last USER names."""
    if PASSWD in state.files:  # the task brings its own
        state.users.to_make.clear()
        return
    state.files |= {path: SandboxFile(text.encode()) for path, text in state.users.tables().items()}
    last = next((step for step in reversed(steps) if isinstance(step, User)), None)
    if last is not None and not last.is_root and (name := state.users.entered):
        home = state.users.homes[name]
        state.env = {"HOME": home, "USER": name, "LOGNAME": name} | state.env


def read_file(path: Path, root: Path) -> SandboxFile:
    """Read a regular file below ``root``; links are followed as long as they stay below it.

    Of its mode only the owner's right to execute is kept, as in git: the rest depends on who checked it out.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise TaskError(f"{path} leads out of {root}; copy what it points at into the task's folder")
    if not path.is_file():
        raise TaskError(f"{path} is no regular file; a task's folder holds files and folders only")
    return SandboxFile(path.read_bytes(), mode=0o755 if path.stat().st_mode & 0o100 else 0o644)


def read_tree(folder: Path, root: Path | None = None) -> dict[str, SandboxFile]:
    """Read every file below ``folder``; return them by their path from there."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.is_file():
            raise TaskError(f"{path} is a link to a folder or to nothing; put the files themselves there")
        if not path.is_dir():
            files[path.relative_to(folder).as_posix()] = read_file(path, root or folder)
    return files


def _carry_out(state: StartState, step: Step) -> None:
    match step:
        case Workdir(path=path) if is_program_path(path):
            raise TaskError(f"{path} {WHY_NOT_THERE}")
        case Workdir(path=path):
            if path not in state.folders and not _is_below(state.workdir, path):
                state.setup.append(("/", f"mkdir -p {shlex.quote(path)}"))
            state.folders.add(path)
        case User(name=name) if not step.is_root:
            state.users.enter(name, state.image or "", installs=bool(state.installs))
        case Shell(words=words) if posixpath.basename(words[0]) not in ("sh", "bash"):
            raise TaskError(f"commands are run by bash, and {' '.join(words)} is another shell")
        case Copy():
            _copy(state, step)
        case Run():
            _run(state, step)


def _copy(state: StartState, copy: Copy) -> None:
    """Add the files of a COPY, or the command that copies them in its turn."""
    trees = [(source, _read_source(state, source, copy.mode)) for source in copy.sources]
    if is_program_path(copy.to):
        raise TaskError(f"{copy.to} {WHY_NOT_THERE}")
    if copy.owner:
        state.notes.append("a sandbox's one user owns every file: --chown does nothing")
    # A command may have made any folder, so that only then is it known whether the destination is one.
    if state.ran or copy.to.startswith(writable_program_folders()):
        stage = f"/.copy-{copy.line}"
        for source, tree in trees:
            state.files |= {f"{stage}/{source.name}/{path}".rstrip("/"): file for path, file in tree}
        folders = shlex.join(["mkdir", "-p", *(f"{stage}/{s.name}" for s, _ in trees if s.kind == "d"), stage])
        words = shlex.join([stage, *copy.arguments])
        state.setup.append(("/", f"{folders}\nset -- {words}\n{COPY_SCRIPT}rm -rf {stage}"))
        return
    to = copy.to if copy.to == "/" else copy.to.rstrip("/")
    for source, tree in trees:
        is_folder = len(trees) > 1 or copy.to.endswith("/") or to in state.folders
        name = posixpath.basename(source.name) if source.kind == "f" and is_folder else ""
        placed = {posixpath.join(to, name or path).rstrip("/"): file for path, file in tree}
        state.files |= placed
        state.folders |= {str(parent) for place in placed for parent in PurePosixPath(place).parents}


def _read_source(state: StartState, source: Source, mode: int | None) -> list[tuple[str, SandboxFile]]:
    """Read the files of one source of a COPY, by their path below it; a file's own path is empty."""
    if source.kind == "a":
        raise TaskError(f"ADD {posixpath.basename(source.name)} fetches or unpacks; put the files there and use COPY")
    if source.path is None:
        files = {"": SandboxFile(source.text.encode())}
    elif source.kind == "d":
        files = read_tree(source.path, state.folder)
    else:
        files = {"": read_file(source.path, state.folder)}
    return [(path, file if mode is None else replace(file, mode=mode)) for path, file in files.items()]


def _run(state: StartState, run: Run) -> None:
    command, outside = run.command, run.outside
    if run.is_script:
        command = outside = command.removesuffix("\n")
        first = command.partition("\n")[0]
        if first.startswith("#!") and not re.search(r"\b(ba)?sh\b", first):
            raise TaskError(f"{first} is not bash; write the script to a file with COPY and run that")
    elif run.words:
        command = outside = shlex.join(run.words)
    elif _set_file_states(state, command):
        return
    # A heredoc that is not the script itself is a file's content and is not checked as commands.
    parts = split_list(outside) if "\n" not in outside else [("", line.strip()) for line in outside.split("\n")]
    kept = _without_packages(state, command, parts)
    if kept is None:
        return
    if _NETWORK.search(outside):
        raise TaskError(f"{kept[:200]!r} needs the network, and a sandbox has none; put the files there with COPY")
    for _, part in parts:
        if path := program_written_to(part):
            raise TaskError(f"{part[:200]!r} cannot write there: {path} {WHY_NOT_THERE}")
    before, notes = state.users.stand_in(outside, {**run.args, **run.env})
    state.notes += notes
    state.needs += state.users.commands
    if re.fullmatch(r"mkdir -p( [\w./-]+)+", kept):
        state.folders |= {posixpath.normpath(posixpath.join(run.workdir, word)) for word in kept.split()[2:]}
    else:
        state.ran = True
    state.setup.append((run.workdir, _shell_state(state, run) + before + kept))


def _shell_state(state: StartState, run: Run) -> str:
    """Return shell text that sets a command's variables and options where they differ from the task's."""
    given = {**run.args, **run.env}
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in given.items() if state.env.get(name) != value]
    for name in state.env.keys() - given.keys():  # a later ENV sets it
        lines.append(f"export PATH={DEFAULT_PATH}\n" if name == "PATH" else f"unset {name}\n")
    options = [re.sub(r"^-\w+", lambda found: re.sub("[cil]", "", found.group()), word) for word in run.shell[1:]]
    if options := [word for word in options if word not in ("-", "-e")]:
        lines.append(f"set {shlex.join(options)}\n")
    return "".join(lines)


def _set_file_states(state: StartState, command: str) -> bool:
    """Apply ``chmod 600 FILES`` and ``touch -d @SECONDS FILES`` to copied files; return whether that was all."""
    changed = dict(state.files)
    for _, part in split_list(command):
        match = _FILE_STATE.fullmatch(part)
        paths = shlex.split(match.group(3) or match.group(6)) if match else []
        if not match or state.ran or any(path not in changed for path in paths):
            return False
        for path in paths:
            change = {"mode": int(match.group(2), 8)} if match.group(1) else {"mtime": int(match.group(5))}
            changed[path] = replace(changed[path], **change)
    state.files = changed
    return True


def _without_packages(state: StartState, command: str, parts: list[tuple[str, str]]) -> str | None:
    """Return the command without package managers, which cannot run offline; None if nothing is left."""
    links = [part for _, part in parts if PYTHON_LINK.match(part)]
    state.needs += ["python"] * bool(links)
    packages = [part for _, part in parts if PACKAGES.match(part)]
    if state.host_packages:
        command, parts = with_host_packages(command), [(before, with_host_packages(part)) for before, part in parts]
    if not packages and (not links or "\n" in command):
        return command
    if packages and not state.host_packages:
        raise TaskError(
            f"{packages[0]!r} needs the network, and a sandbox has none; install the packages on this machine, then "
            f"{PASS_HOST_PACKAGES}, and the line is left out"
        )
    if "\n" in command:
        raise TaskError(f"{packages[0]!r} stands in a script; give it a RUN line of its own, to be left out")
    state.installs += packages
    state.notes += [f"left out, this machine's packages are used: {part}" for part in packages]
    left_out = [PYTHON_LINK, *([PACKAGES, _AFTER_PACKAGES] if packages else [])]
    kept = [(before, part) for before, part in parts if not any(pattern.match(part) for pattern in left_out)]
    return "".join(part if not at else f" {before} {part}" for at, (before, part) in enumerate(kept)) or None


def _is_below(path: str, folder: str) -> bool:
    """Return whether ``path`` is ``folder`` or below it, so that making it makes the folder."""
    return folder == "/" or f"{path}/".startswith(f"{folder}/")
