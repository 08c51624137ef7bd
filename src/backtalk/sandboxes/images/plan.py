"""Interpret a Dockerfile as a plan of steps, with every path, variable and flag resolved and checked.

Two modules carry out a plan: `build` builds a root file system from it, `start_state` starts a task over this machine's
programs. The first lines of `start_state` say where and why the two differ.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from backtalk.errors import ConfigError
from backtalk.sandboxes.base import DEFAULT_PATH
from backtalk.sandboxes.images.dockerfile import (
    HEREDOC_MARK,
    NO_EFFECT,
    SCRIPT,
    WHY_NOT,
    Instruction,
    assignments,
    is_json,
    only_waits,
    parse_dockerfile,
    split_flags,
)
from backtalk.sandboxes.images.shellwords import expand, read_word, split_words

_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$")
_OWNERS = re.compile(r"\b(?:chown|chgrp)\s")
# $1 is the folder of the sources, $2 the destination; then pairs: f FILE, d FOLDER (its content), a ARCHIVE.
COPY_SCRIPT = """\
stage=$1; to=$2; shift 2; many=$(( $# > 2 ))
while [ $# -gt 0 ]; do
  from=$stage/$2
  case $1 in
    d) mkdir -p -- "$to"; cp -a -- "$from/." "$to/" ;;
    a) mkdir -p -- "$to"; tar -xf "$from" -C "$to" ;;
    f) case $to in */) mkdir -p -- "$to" ;; *) mkdir -p -- "$(dirname -- "$to")" ;; esac
       [ $many = 0 ] || mkdir -p -- "$to"
       if [ -d "$to" ]; then to_file=${to%/}/${2##*/}; else to_file=$to; fi
       cp -a -- "$from" "$to_file" ;;
  esac
  shift 2
done
"""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a COPY. ``kind``: d a folder's content, f a file, a an archive to unpack, s a path in a stage."""

    kind: str
    name: str
    path: Path | None = None  # None: `text` is its content, or its path in `stage`
    text: str = ""
    stage: Stage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """An instruction to be carried out, and the line it begins on."""

    line: int
    keyword: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Workdir(Step):
    """WORKDIR: make a folder, in which later steps run."""

    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class User(Step):
    """USER: change the user of later steps."""

    name: str

    @property
    def is_root(self) -> bool:
        """Return whether the user is root."""
        return self.name.split(":")[0] in ("root", "0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shell(Step):
    """SHELL: change the shell of later steps."""

    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy(Step):
    """COPY or ADD: copy ``sources`` to ``to``, an absolute path that ends in "/" if it must be a folder."""

    sources: tuple[Source, ...]
    to: str
    mode: int | None = None
    owner: str = ""  # of --chown

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the destination and the sources, as COPY_SCRIPT takes them."""
        return (self.to, *(word for source in self.sources for word in (source.kind, source.name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(Step):
    """RUN: run a command, with the state that the instructions before it left."""

    command: str  # as a shell reads it; heredocs within it are part of it
    outside: str  # the command without the bodies of heredocs that are a file's content
    words: tuple[str, ...] = ()  # exec form, run without a shell; used in place of the command
    is_script: bool = False  # the command is the body of a heredoc
    env: Mapping[str, str] = field(default_factory=dict)  # of ENV alone
    args: Mapping[str, str] = field(default_factory=dict)  # of ARG, those with a value that ENV does not hide
    workdir: str = "/"
    as_root: bool = True
    shell: tuple[str, ...] = ()

    @property
    def before(self) -> str:
        """Return shell text to run before the command: functions that replace chown and chgrp by nothing.

        A sandbox has one user, so that there is no other owner for a file.
        """
        return "chown() { :; }; chgrp() { :; }\n" if _OWNERS.search(self.outside) else ""


@dataclass
class Stage:
    """A stage of the build: one FROM and the instructions below it. Grows while the Dockerfile is read."""

    line: int
    image: str = ""  # an image's name; empty if `parent` is a stage of the file
    parent: Stage | None = None
    name: str = ""
    steps: list[Step] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    has_workdir: bool = False
    as_root: bool = True
    shell: tuple[str, ...] = ("/bin/sh", "-c")

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables that an instruction sees."""
        return {"PATH": DEFAULT_PATH} | self.args | self.env

    def absolute(self, path: str) -> str:
        """Return a path from the root, without detours."""
        return posixpath.normpath("/" + posixpath.join(self.workdir, path).lstrip("/"))


@dataclass
class Plan:
    """A Dockerfile's stages, of which the last one is the result. Grows while the Dockerfile is read."""

    path: Path
    stages: list[Stage] = field(default_factory=list)
    args: dict[str, str] = field(default_factory=dict)  # of ARG before the first FROM, for FROM and for a bare ARG

    @property
    def last(self) -> Stage:
        """Return the stage that is the result, or the one that is being read."""
        return self.stages[-1]

    def stage(self, name: str) -> Stage | None:
        """Return the stage with this name or number, of those read so far."""
        named = {**{str(at): stage for at, stage in enumerate(self.stages)}, **{s.name: s for s in self.stages}}
        return named.get(name.lower()) if name else None


def read_plan(path: Path) -> Plan:
    """Read and check a Dockerfile.

    Raises:
        ConfigError: an instruction that cannot be carried out, with its line and the reason.
    """
    if (path.parent / ".dockerignore").exists():
        raise ConfigError(f"{path.parent / '.dockerignore'} is not read; name the files to COPY one by one instead")
    plan = Plan(path)
    for instruction in parse_dockerfile(path.read_bytes().decode("utf-8-sig", "replace")):
        try:
            if not plan.stages and instruction.keyword not in ("FROM", "ARG"):
                raise ValueError("the first instruction must be FROM")
            _read(plan, instruction)
        except (ValueError, OSError) as error:  # ValueError: ours, and those of json and int
            raise ConfigError(f"{path}, line {instruction.line}: {instruction.keyword}: {error}") from error
    if not plan.stages:
        raise ConfigError(f"{path} has no FROM; write the image that it starts from")
    return plan


def _read(plan: Plan, instruction: Instruction) -> None:
    text, at = instruction.text, {"line": instruction.line, "keyword": instruction.keyword}
    if instruction.keyword == "FROM":
        plan.stages.append(_read_from(plan, instruction))
        return
    if instruction.keyword == "ARG":
        _read_arg(plan, text)
        return
    stage = plan.last
    match instruction.keyword:
        case "ENV":
            stage.env.update(assignments(text, stage.variables))
            if wrong := [name for name in stage.env if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]:
                raise ValueError(f"{wrong[0]!r} is no name that bash can set; use letters, digits and _")
        case "WORKDIR":
            stage.workdir, stage.has_workdir = stage.absolute(read_word(text, stage.variables)), True
            stage.steps.append(Workdir(**at, path=stage.workdir))
        case "USER":
            user = User(**at, name=read_word(text, stage.variables))
            stage.as_root = user.is_root
            stage.steps.append(user)
        case "SHELL":
            words = json.loads(text)
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise ValueError(f"{text} is no list of words")
            stage.shell = tuple(words)
            stage.steps.append(Shell(**at, words=stage.shell))
        case "COPY" | "ADD":
            stage.steps.append(_read_copy(plan, instruction))
        case "RUN":
            stage.steps.append(_read_run(stage, instruction))
        case "VOLUME":
            folders = json.loads(text) if is_json(text) else split_words(text)
            made = shlex.join(["mkdir", "-p", *(stage.absolute(expand(folder, stage.variables)) for folder in folders)])
            stage.steps.append(_read_run(stage, replace(instruction, keyword="RUN", text=made, shell=made)))
        case "ENTRYPOINT" if only_waits(text):
            pass
        case "HEALTHCHECK" if text.upper() == "NONE":
            pass
        case keyword if keyword in NO_EFFECT:
            pass
        case keyword:
            raise ValueError(f"{text!r} cannot be carried out: {WHY_NOT.get(keyword, 'no such instruction is known')}")


def _read_from(plan: Plan, instruction: Instruction) -> Stage:
    match [word for word in instruction.text.split() if not word.startswith("--")]:
        case [image]:
            name = ""
        case [image, as_, name] if as_.lower() == "as":
            pass
        case _:
            raise ValueError(f"{instruction.text!r} is not IMAGE or IMAGE AS NAME")
    image = expand(image, plan.args)
    if (parent := plan.stage(image)) is None or image.isdigit():
        return Stage(instruction.line, image, name=name.lower())
    kept = {"workdir": parent.workdir, "has_workdir": parent.has_workdir, "as_root": parent.as_root}
    return Stage(instruction.line, "", parent, name.lower(), env=dict(parent.env), shell=parent.shell, **kept)


def _read_arg(plan: Plan, text: str) -> None:
    """Read ARG; a name without a value takes that of an ARG before the first FROM."""
    if not (words := split_words(text)):
        raise ValueError("a name is missing")
    for word in words:
        name, sign, value = word.partition("=")
        if not plan.stages:
            plan.args[name] = read_word(value, plan.args)
        else:
            plan.last.args[name] = read_word(value, plan.last.variables) if sign else plan.args.get(name, "")


def _read_run(stage: Stage, instruction: Instruction) -> Run:
    flags, command = split_flags(instruction.shell)
    if any(not flag.startswith(("mount=type=cache", "network=none")) for flag in flags):
        raise ValueError(f"--{' --'.join(flags)} cannot be carried out: there is no image builder here")
    outside = split_flags(instruction.text)[1]
    is_script = bool(instruction.heredocs and SCRIPT.fullmatch(outside))
    words: tuple[str, ...] = ()
    if is_script:
        command = outside = instruction.heredocs[0].body
    elif command.startswith("[") and is_json(command):
        words = tuple(map(str, json.loads(command)))
    return Run(
        line=instruction.line,
        keyword=instruction.keyword,
        command=command,
        outside=outside,
        words=words,
        is_script=is_script,
        env=dict(stage.env),
        args={name: value for name, value in stage.args.items() if value and name not in stage.env},
        workdir=stage.workdir,
        as_root=stage.as_root,
        shell=stage.shell,
    )


def _read_copy(plan: Plan, instruction: Instruction) -> Copy:
    stage, folder, is_add = plan.last, plan.path.parent, instruction.keyword == "ADD"
    flags, text = split_flags(instruction.text)
    mode, origin, owner = None, None, ""
    for name, _, value in (flag.partition("=") for flag in flags):
        if name == "chmod":
            mode = int(value, 8)
        elif name == "from" and not is_add:
            origin = next((s for s in [plan.stage(value)] if s is not None and s is not stage), None)
            if origin is None:
                raise ValueError(
                    f"--from={value} cannot be carried out: no stage above has that name, and there is no "
                    "image to copy from"
                )
        elif name == "chown":
            owner = value
        elif name != "link":  # there is nothing to link to
            raise ValueError(
                f"--{name} cannot be carried out; leave it out, and name the files to {instruction.keyword}"
            )
    words = json.loads(text) if text.startswith("[") else None
    words = words or [read_word(word, stage.variables) for word in split_words(text)]
    if len(words) < 2:
        raise ValueError(f"{text!r} needs a source and a destination")
    heredocs = iter(instruction.heredocs)
    sources: list[Source] = []
    for word in words[:-1]:
        if origin is not None:
            if re.search(r"[*?[]", word):
                raise ValueError(f"{word!r} is a pattern; name the files of a stage one by one")
            sources.append(Source("s", posixpath.basename(word.rstrip("/")) or "all", text=word, stage=origin))
        elif mark := HEREDOC_MARK.fullmatch(word):
            heredoc = next(heredocs)
            body = expand(heredoc.body, stage.variables) if heredoc.expand else heredoc.body
            sources.append(Source("f", mark.group(3), text=body))
        else:
            sources += _sources(folder, word, is_add=is_add)
    is_folder = posixpath.basename(words[-1]) in ("", ".", "..")
    to = stage.absolute(words[-1])
    named = tuple(replace(source, name=f"{index}/{source.name}") for index, source in enumerate(sources))
    return Copy(
        line=instruction.line,
        keyword=instruction.keyword,
        sources=named,
        to=to + "/" if is_folder and to != "/" else to,
        mode=mode,
        owner=owner,
    )


def _sources(folder: Path, word: str, *, is_add: bool) -> Iterator[Source]:
    """Yield the files, folders and, for ADD, archives that a source of a COPY names in the Dockerfile's folder."""
    if is_add and re.match(r"\w+://|git@", word):
        raise ValueError(f"{word} needs the network, and a build has none; put the file there and use COPY")
    relative = posixpath.normpath(word.lstrip("/"))
    if relative.split("/")[0] == "..":
        raise ValueError(f"there is no {word!r} in {folder}: it leads out of it; copy it into that folder")
    matches = [folder] if relative == "." else sorted(folder.glob(relative))
    if not matches:
        raise ValueError(f"there is no {word!r} in {folder}")
    for path in matches:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of {folder}; copy what it points at into that folder")
        kind = "d" if path.is_dir() else "a" if is_add and _ARCHIVE.search(path.name) else "f"
        yield Source(kind, path.name or "all", path)
