"""Reads a Dockerfile into the steps that build a root: FROM, RUN, COPY, ADD, ENV, ARG, WORKDIR, USER, SHELL.

Everything is read and checked before anything is done. What cannot be carried out is refused with its line.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
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
    parse_dockerfile,
    split_flags,
)
from backtalk.sandboxes.images.shellwords import expand, read_word, split_words

_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)$")
STAGE = "/.stage"  # files on their way into the tree being built
# $1 the destination; then f NAME, d NAME (a folder's content) or a NAME (an archive) below the stage.
_COPY = f"""
set -e; to=$1; shift; many=$(( $# > 2 ))
while [ $# -gt 0 ]; do
  from={STAGE}/$2
  case $1 in
    d) mkdir -p -- "$to"; cp -a -- "$from/." "$to/" ;;
    a) mkdir -p -- "$to"; tar -xf "$from" -C "$to" ;;
    f) case $to in */) mkdir -p -- "$to" ;; *) mkdir -p -- "$(dirname -- "$to")" ;; esac
       [ $many = 0 ] || mkdir -p -- "$to"
       if [ -d "$to" ]; then to_file=${{to%/}}/${{2##*/}}; else to_file=$to; fi
       cp -a -- "$from" "$to_file" ;;
  esac
  shift 2
done
"""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a COPY. ``kind``: d a folder's content, f a file, a an archive to unpack."""

    kind: str
    name: str
    path: Path | None = None  # None: `text` is its content
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Something to do to the tree, as `line` says."""

    line: int
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    as_root: bool = True
    sources: tuple[Source, ...] = ()
    mode: int | None = None  # of copied files


@dataclass
class Plan:
    """What a Dockerfile asks for. Grows while it is read."""

    path: Path
    image: str = ""
    steps: list[Step] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    has_workdir: bool = False
    as_root: bool = True
    shell: tuple[str, ...] = ("/bin/sh", "-c")

    @property
    def variables(self) -> dict[str, str]:
        return {"PATH": DEFAULT_PATH} | self.args | self.env

    def absolute(self, path: str) -> str:
        return posixpath.normpath("/" + posixpath.join(self.workdir, path).lstrip("/"))


def read_plan(path: Path) -> Plan:
    """Read and check a Dockerfile.

    Raises:
        ConfigError: what cannot be carried out, with its line and the reason.
    """
    if (path.parent / ".dockerignore").exists():
        raise ConfigError(f"{path.parent / '.dockerignore'} is not read; name the files to COPY one by one instead")
    plan = Plan(path)
    for instruction in parse_dockerfile(path.read_text("utf-8", "replace")):
        try:
            if not plan.image and instruction.keyword not in ("FROM", "ARG"):
                raise ValueError("the first instruction must be FROM")
            _read(plan, instruction)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path}, line {instruction.line}: {instruction.keyword}: {error}") from error
    if not plan.image:
        raise ConfigError(f"{path} has no FROM")
    return plan


def _read(plan: Plan, instruction: Instruction) -> None:
    text = instruction.text
    match instruction.keyword:
        case "FROM":
            words = [word for word in text.split() if not word.startswith("--")]
            if plan.image or not words:
                raise ValueError("one FROM with an image is needed; copy what another stage would give")
            plan.image = expand(words[0], plan.args)
        case "ARG":
            plan.args.update(assignments(text, plan.variables))
        case "ENV":
            plan.env.update(assignments(text, plan.variables))
            if wrong := [name for name in plan.env if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]:
                raise ValueError(f"{wrong[0]!r} is no name that bash can set; use letters, digits and _")
        case "WORKDIR":
            plan.workdir, plan.has_workdir = plan.absolute(read_word(text, plan.variables)), True
            plan.steps.append(Step(line=instruction.line, argv=("mkdir", "-p", "--", plan.workdir)))
        case "USER":
            plan.as_root = read_word(text, plan.variables).split(":")[0] in ("root", "0")
        case "SHELL":
            plan.shell = tuple(json.loads(text))
            if not plan.shell or not all(isinstance(word, str) for word in plan.shell):
                raise ValueError(f"{text} is no list of words")
        case "COPY" | "ADD":
            _read_copy(plan, instruction)
        case "RUN":
            plan.steps.append(_read_run(plan, instruction))
        case keyword if keyword in NO_EFFECT:
            pass
        case keyword:
            raise ValueError(f"{text!r} cannot be carried out: {WHY_NOT.get(keyword, 'no such instruction is known')}")


def _read_run(plan: Plan, instruction: Instruction) -> Step:
    flags, command = split_flags(instruction.shell)
    if any(not flag.startswith(("mount=type=cache", "network=none")) for flag in flags):
        raise ValueError(f"--{' --'.join(flags)} cannot be carried out: there is no image builder here")
    sources: tuple[Source, ...] = ()
    argv = (*plan.shell, command)
    if instruction.heredocs and SCRIPT.fullmatch(split_flags(instruction.text)[1]):
        body = instruction.heredocs[0].body
        sources = (Source("f", "script", text=body),) if body.startswith("#!") else ()
        argv = (f"{STAGE}/script",) if sources else (*plan.shell, body)
    elif command.startswith("[") and is_json(command):
        argv = tuple(map(str, json.loads(command)))
    env = {name: value for name, value in {**plan.args, **plan.env}.items() if value or name in plan.env}
    step = Step(line=instruction.line, argv=argv, env=env, workdir=plan.workdir, as_root=plan.as_root)
    return replace(step, sources=sources, mode=0o755 if sources else None)


def _read_copy(plan: Plan, instruction: Instruction) -> None:
    flags, text = split_flags(instruction.text)
    mode = None
    for flag in flags:
        name, _, value = flag.partition("=")
        if name == "chmod":
            mode = int(value, 8)
        elif name not in ("chown", "link"):  # there is one user, and nothing to link to
            raise ValueError(f"--{flag} cannot be carried out: there is no image to copy from")
    known = plan.variables
    words = json.loads(text) if text.startswith("[") else [read_word(word, known) for word in split_words(text)]
    if len(words) < 2:
        raise ValueError(f"{text!r} needs a source and a destination")
    heredocs = iter(instruction.heredocs)
    sources: list[Source] = []
    for word in words[:-1]:
        if mark := HEREDOC_MARK.fullmatch(word):
            heredoc = next(heredocs)
            body = expand(heredoc.body, known) if heredoc.expand else heredoc.body
            sources.append(Source("f", mark.group(3), text=body))
        else:
            sources += _sources(plan.path.parent.resolve(), word, is_add=instruction.keyword == "ADD")
    to = plan.absolute(words[-1]) + ("/" if words[-1].endswith(("/", ".")) else "")
    named = tuple(replace(source, name=f"{index}/{source.name}") for index, source in enumerate(sources))
    pairs = [word for source in named for word in (source.kind, source.name)]
    argv = ("bash", "-c", _COPY, "copy", to, *pairs)
    plan.steps.append(Step(line=instruction.line, argv=argv, sources=named, mode=mode))


def _sources(folder: Path, word: str, *, is_add: bool) -> list[Source]:
    """What one source of a COPY means: files, folders and, for ADD, archives."""
    if is_add and re.match(r"\w+://|git@", word):
        raise ValueError(f"{word} needs the network, and a build has none; put the file there and use COPY")
    relative = posixpath.normpath(word.lstrip("/"))
    matches = [folder] if relative == "." else sorted(folder.glob(relative)) if relative[:2] != ".." else []
    if not matches:
        raise ValueError(f"there is no {word!r} in {folder}")
    found = []
    for path in matches:
        if not path.resolve().is_relative_to(folder):
            raise ValueError(f"{path} leads out of {folder}; copy what it points at into that folder")
        kind = "d" if path.is_dir() else "a" if is_add and _ARCHIVE.search(path.name) else "f"
        found.append(Source(kind, path.name or "all", path))
    return found
