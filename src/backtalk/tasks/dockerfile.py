"""The part of the Dockerfile language that says how a task's world starts: FROM, COPY, ADD, RUN, ENV, ARG, WORKDIR.

There is no image here: the sandbox shows this machine's own /usr, and everything else is files and commands.
What cannot be carried over is refused with its line, never skipped in silence.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from backtalk.errors import TaskError
from backtalk.sandboxes.base import SandboxFile
from backtalk.sandboxes.images.dockerfile import (
    HEREDOC_MARK,
    NO_EFFECT,
    SCRIPT,
    WHY_NOT,
    Instruction,
    assignments,
    is_json,
    parse_dockerfile,
    split_flags,
)
from backtalk.sandboxes.images.shellwords import expand, read_word, split_list, split_words

_PACKAGES = re.compile(r"(?:\w+=\S+\s+)*(?:apt-get|apt|apk|yum|dnf|npm|pip3?|python3?\s+-m\s+pip|uv\s+pip|conda)\s")
_AFTER_PACKAGES = re.compile(r"(?:rm\s+-rf\s+/var/lib/apt/lists/?\*?|ln\s+-sf?\s+/usr/bin/python3\s+/usr/bin/python)$")
NETWORK = re.compile(r"\b(?:curl|wget|git\s+clone)\b.*\bhttps?://(?!localhost|127\.)")
_FILE_STATE = re.compile(r"(chmod) ([0-7]{3,4}) (.+)|(touch) -d @(-?\d+) (.+)")
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$")
_WHY_NOT = WHY_NOT | {"USER": "a sandbox has one ordinary user"}


@dataclass
class World:
    """What a Dockerfile builds, as far as the sandbox can have it. Grows while the file is read."""

    folder: Path
    host_packages: bool = False
    image: str | None = None
    files: dict[str, SandboxFile] = field(default_factory=dict)
    setup: list[tuple[str, str]] = field(default_factory=list)  # (folder, command)
    ran: bool = False  # a command ran that may have touched any file
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    folders: set[str] = field(default_factory=lambda: {"/"})  # known to exist, which decides what COPY x /y means
    notes: list[str] = field(default_factory=list)


def read_dockerfile(folder: Path, *, host_packages: bool) -> World:
    """Read ``folder``/Dockerfile.

    Raises:
        TaskError: an instruction that the sandbox cannot carry out, with its line and the reason.
    """
    path = folder / "Dockerfile"
    if (folder / ".dockerignore").exists():
        raise TaskError(f"{folder / '.dockerignore'} is not read; name the files to COPY one by one instead")
    world = World(folder, host_packages=host_packages)
    for instruction in parse_dockerfile(path.read_bytes().decode("utf-8", "replace")):
        try:
            _carry_out(world, instruction)
        except (TaskError, ValueError) as error:  # ValueError: shlex, json, a bad number
            raise TaskError(f"{path}, line {instruction.line}: {instruction.keyword}: {error}") from error
    return world


def read_file(path: Path, root: Path) -> SandboxFile:
    """A regular file below ``root``; links are followed as long as they stay below it.

    Only whether its owner may run it is taken of its mode, as git does: the rest depends on who checked it out.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise TaskError(f"{path} leads out of {root}; copy what it points at into the task's folder")
    if not path.is_file():
        raise TaskError(f"{path} is no regular file; a task's folder holds files and folders only")
    return SandboxFile(path.read_bytes(), mode=0o755 if path.stat().st_mode & 0o100 else 0o644)


def read_tree(folder: Path, root: Path | None = None) -> dict[str, SandboxFile]:
    """Every file below ``folder`` by its path from there."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.is_file():
            raise TaskError(f"{path} is a link to a folder or to nothing; put the files themselves there")
        if not path.is_dir():
            files[path.relative_to(folder).as_posix()] = read_file(path, root or folder)
    return files


def _carry_out(world: World, instruction: Instruction) -> None:
    text = instruction.text
    match instruction.keyword:
        case "FROM":
            if world.image is not None:
                raise TaskError("a build in several stages cannot run here; copy what the last stage needs")
            words = [word for word in text.split() if not word.startswith("--")]
            world.image = expand(words[0], world.args) if words else ""
        case "ARG":
            for name, value in assignments(text, _variables(world)):
                world.args[name] = value
        case "ENV":
            world.env.update(assignments(text, _variables(world)))
        case "WORKDIR":
            world.workdir = _absolute(world, read_word(text, _variables(world)))
            world.folders.add(world.workdir)
        case "COPY" | "ADD":
            _copy(world, instruction)
        case "RUN":
            _run(world, instruction)
        case "SHELL":
            if posixpath.basename(json.loads(text)[0]) not in ("sh", "bash"):
                raise TaskError(f"commands are run by bash, and {text} is another shell")
        case "USER" if text.split(":")[0] in ("root", "0"):
            pass  # what it was anyway
        case keyword if keyword in NO_EFFECT:
            pass
        case keyword:
            raise TaskError(f"{text!r} cannot be carried out: {_WHY_NOT.get(keyword, 'no such instruction is known')}")


def _copy(world: World, instruction: Instruction) -> None:
    flags, text = split_flags(instruction.text)
    mode = None
    for flag in flags:
        name, _, value = flag.partition("=")
        if name == "chmod":
            mode = int(value, 8)
        elif name not in ("chown", "link"):  # there is one user, and nothing to link to
            raise TaskError(f"--{flag} cannot be carried out: there is no image to copy from")
    known = _variables(world)
    words = json.loads(text) if text.startswith("[") else [read_word(word, known) for word in split_words(text)]
    if len(words) < 2:
        raise TaskError(f"{text!r} needs a source and a destination")
    *sources, to = words
    copied: dict[str, SandboxFile] = {}
    heredocs = iter(instruction.heredocs)
    for source in sources:
        into_folder = len(sources) > 1 or to.endswith("/") or _absolute(world, to) in world.folders or to == "."
        if mark := HEREDOC_MARK.fullmatch(source):
            heredoc = next(heredocs)
            body = expand(heredoc.body, known) if heredoc.expand else heredoc.body
            files = {mark.group(3): SandboxFile(body.encode())}
        else:
            files = _sources(world, source, is_add=instruction.keyword == "ADD")
            into_folder = into_folder or len(files) > 1 or (world.folder / source).is_dir()
        for name, file in files.items():
            place = _absolute(world, posixpath.join(to, name) if into_folder else to)
            copied[place] = file if mode is None else replace(file, mode=mode)
    world.folders |= {parent for place in copied for parent in _parents(place)}
    if not world.ran:
        world.files |= copied
        return
    # A command ran before: these files come after it, as the Dockerfile says.
    stage = f"/.copy-{instruction.line}"
    world.files |= {stage + place: file for place, file in copied.items()}
    move = """find . -type f -exec sh -ec 'mkdir -p "/${1%/*}"; mv -f "$1" "/$1"' sh {} \\;"""
    world.setup.append(("/", f"cd {stage}\n{move}\ncd /\nrm -rf {stage}"))


def _sources(world: World, source: str, *, is_add: bool) -> dict[str, SandboxFile]:
    """The files that one source of a COPY means, by their path below the destination."""
    if is_add and (re.match(r"\w+://|git@", source) or _ARCHIVE.search(source)):
        raise TaskError(f"ADD {source} fetches or unpacks; put the files themselves there and use COPY")
    relative = posixpath.normpath(source.lstrip("/"))
    if relative.split("/")[0] == "..":
        raise TaskError(f"{source!r} leads out of {world.folder}; copy what it points at into that folder")
    matches = [world.folder] if relative == "." else sorted(world.folder.glob(relative))
    if not matches:
        raise TaskError(f"there is no {source!r} in {world.folder}")
    files: dict[str, SandboxFile] = {}
    for path in matches:
        if path.is_dir():
            if not path.resolve().is_relative_to(world.folder.resolve()):
                raise TaskError(f"{path} leads out of {world.folder}; copy what it points at into that folder")
            files |= read_tree(path, world.folder)
        else:
            files[path.name] = read_file(path, world.folder)
    return files


def _run(world: World, instruction: Instruction) -> None:
    flags, command = split_flags(instruction.shell)
    if any(not flag.startswith(("mount=type=cache", "network=none")) for flag in flags):
        raise TaskError(f"--{' --'.join(flags)} cannot be carried out: there is no image builder here")
    script = SCRIPT.fullmatch(instruction.text)
    if script and instruction.heredocs:
        command = instruction.heredocs[0].body.removesuffix("\n")
        first = command.partition("\n")[0]
        if first.startswith("#!") and not re.search(r"\b(ba)?sh\b", first):
            raise TaskError(f"{first} is not bash; write the script to a file with COPY and run that")
    elif command.startswith("[") and is_json(command):
        command = shlex.join(json.loads(command))
    elif _set_file_states(world, command):
        return
    # A heredoc that is not the script itself is some file's content: what it says is not run here.
    said = instruction.text if instruction.heredocs and not script else command
    kept = _without_packages(world, command, said)
    if kept is None:
        return
    command = kept
    if NETWORK.search(said):
        raise TaskError(f"{command[:200]!r} needs the network, and a sandbox has none; put the files there with COPY")
    if re.fullmatch(r"mkdir -p( [\w./-]+)+", command):
        world.folders |= {_absolute(world, word) for word in command.split()[2:]}
    else:
        world.ran = True
    args = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in world.args.items() if v and k not in world.env)
    world.setup.append((world.workdir, args + command))


def _set_file_states(world: World, command: str) -> bool:
    """``chmod 600 FILES`` and ``touch -d @SECONDS FILES`` of copied files: said of the files, no command needed."""
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


def _without_packages(world: World, command: str, said: str) -> str | None:
    """The command without what package managers do, which cannot run offline; None where nothing is left."""
    parts = split_list(said) if "\n" not in said else [("", line.strip()) for line in said.split("\n")]
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
    world.notes += [f"left out, this machine's packages are used: {part}" for part in packages]
    kept = [(before, part) for before, part in parts if not _PACKAGES.match(part) and not _AFTER_PACKAGES.match(part)]
    return "".join(part if not at else f" {before} {part}" for at, (before, part) in enumerate(kept)) or None


def _variables(world: World) -> dict[str, str]:
    path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    return path | world.args | world.env


def _absolute(world: World, path: str) -> str:
    # Joined to "/" first: a path can say ".." as often as it likes and still be inside.
    return posixpath.normpath("/" + posixpath.join(world.workdir, path).lstrip("/"))


def _parents(path: str) -> Iterator[str]:
    while path != "/":
        path = posixpath.dirname(path)
        yield path
