"""Build a root file system from a Dockerfile: its commands run in a sandbox, over a copy of the base.

They run without a network as one user of the host, who is root inside (uid 1000 after USER with another name) and owns
every file. A program that gives files to another user fails; chown and chgrp do nothing. Over this machine's own
programs, ``/usr`` and the like are read-only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from backtalk.errors import ConfigError
from backtalk.sandboxes.bubblewrap import mount
from backtalk.sandboxes.bubblewrap.layers import (
    AGENT_ID,
    ENVIRONMENT,
    FIXED_FILES,
    LINKS_OF_HOST,
    drop_argv,
    mount_argv,
    programs_of_host,
)
from backtalk.sandboxes.images.plan import COPY_SCRIPT, Copy, Plan, Run, Source, Stage, Step, Workdir
from backtalk.sandboxes.machine.probe import Machine
from backtalk.sandboxes.machine.seccomp import seccomp_program
from backtalk.sandboxes.root import Root, cached_folder, file_digest, read_root, resolve_inside
from backtalk.sandboxes.session.pipes import sealed_file

_FORMAT = "2"  # to be changed when the same Dockerfile is built differently
_RUN_TIMEOUT_S = 1800.0
_KEPT_OUTPUT = 2000
_STAGE = "/.stage"  # files on their way into the tree being built


@dataclass(frozen=True, kw_only=True, slots=True)
class _Command:
    """The process that carries out a step in the tree being built."""

    line: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    as_root: bool = True
    sources: tuple[Source, ...] = ()
    mode: int | None = None  # of the sources


def build_root(
    plan: Plan, open_base: Callable[[str], Root | None], machine: Machine, stage: Stage | None = None
) -> Root:
    """Return the root that `plan` describes, or a `stage` of it, from the cache or built now with the stages it needs.

    `open_base` gives the root for an image's name, None for this machine's programs.

    Raises:
        ConfigError: a command failed; nothing is left of the build.
    """
    stage = stage or plan.last

    def other(stage: Stage) -> Root:
        return build_root(plan, open_base, machine, stage)  # from the cache when it is needed again

    base = open_base(stage.image) if stage.parent is None else other(stage.parent)
    commands = [command for step in stage.steps for command in _command(plan, step, other)]
    folder = cached_folder(f"build-{_digest(commands, base)}", lambda new: _build(plan, commands, base, machine, new))
    name = f"{plan.path} (FROM {stage.image}: {base.name if base else 'programs of this machine'})"
    root = Root(name=name, folder=folder)
    if base is not None and base.programs:
        root = read_root(folder, machine, name)
    workdir = stage.workdir if stage.has_workdir else base.workdir if base else None
    return replace(root, env={**(base.env if base else {}), **stage.env}, workdir=workdir)


def _command(plan: Plan, step: Step, built: Callable[[Stage], Root]) -> Iterator[_Command]:
    """Yield the process that carries out a step, if it needs one."""
    match step:
        case Workdir():
            yield _Command(line=step.line, argv=("mkdir", "-p", "--", step.path))
        case Copy():
            found = [_of_stage(plan, step, source, built) for source in step.sources]
            step = replace(step, sources=tuple(found))
            argv = ("bash", "-ec", COPY_SCRIPT, "copy", _STAGE, *step.arguments)
            yield _Command(line=step.line, argv=argv, sources=step.sources, mode=step.mode)
        case Run():
            is_sh = step.shell[0].rpartition("/")[2] in ("sh", "bash", "dash", "ash")
            argv = step.words or (*step.shell, step.before * is_sh + step.command)
            env = {**step.args, **step.env}
            command = _Command(line=step.line, argv=argv, env=env, workdir=step.workdir, as_root=step.as_root)
            if step.is_script and step.command.startswith("#!"):  # it names its own interpreter
                script = (Source("f", "script", text=step.command),)
                command = replace(command, argv=(f"{_STAGE}/script",), sources=script, mode=0o755)
            yield command


def _of_stage(plan: Plan, step: Copy, source: Source, built: Callable[[Stage], Root]) -> Source:
    """Return a source as files of this machine. Links in a stage are not trusted: they never lead out of it."""
    if source.stage is None:
        return source
    folder = built(source.stage).folder
    if (found := resolve_inside(folder, source.text)) is None:
        raise ConfigError(
            f"{plan.path}, line {step.line}: {step.keyword}: there is no {source.text!r} in that stage, which does not "
            "contain this machine's own programs"
        )
    path = folder / found
    return replace(source, kind="d" if path.is_dir() else "f", path=path, text="", stage=None)


def _digest(commands: Sequence[_Command], base: Root | None) -> str:
    """Hash everything that the built tree depends on."""
    digest = hashlib.sha256(f"{_FORMAT} {_identity(base)}".encode())
    for step in commands:
        digest.update(repr((step.argv, sorted(step.env.items()), step.workdir, step.as_root, step.mode)).encode())
        for source in step.sources:
            digest.update(repr((source.kind, source.name, source.text)).encode())
            for path in _files(source):
                content = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else file_digest(path)
                mode = 0 if path.is_symlink() else path.stat().st_mode & 0o100
                digest.update(repr((str(path.relative_to(source.path or path)), mode, content)).encode())
    return digest.hexdigest()[:32]


def _files(source: Source) -> list[Path]:
    """Return the files of this machine that a source copies."""
    if source.path is None:
        return []
    return sorted(source.path.rglob("*")) if source.kind == "d" else [source.path]


def _identity(base: Root | None) -> str:
    """Return a text that differs between bases: the cache key of a cached one, or a hash of a folder's file states."""
    if base is None:
        return "host"
    if base.folder.name.startswith(("tar-", "build-")):
        return base.folder.name
    digest = hashlib.sha256(str(base.folder).encode())
    for folder, names, files in os.walk(base.folder):
        names.sort()
        for name in sorted(files):
            state = os.lstat(f"{folder}/{name}")
            digest.update(
                f"{folder}/{name} {state.st_size} {state.st_mtime_ns} {state.st_mode}\n".encode(errors="replace")
            )
    return digest.hexdigest()


def _build(plan: Plan, commands: Sequence[_Command], base: Root | None, machine: Machine, folder: Path) -> None:
    """Copy the base into a new folder and run the commands there."""
    folder.chmod(0o755)
    if base is None:
        for path, text in FIXED_FILES.items():
            (folder / path.lstrip("/")).parent.mkdir(exist_ok=True)
            (folder / path.lstrip("/")).write_text(text)
        for path, target in LINKS_OF_HOST.items():
            (folder / path.lstrip("/")).symlink_to(target)
        (folder / "tmp").mkdir(mode=0o777)
    else:
        tops = [str(path) for path in base.folder.iterdir() if path.name not in ("dev", "proc", "sys")]
        copied = subprocess.run(["cp", "-a", "--", *tops, str(folder)], capture_output=True, text=True, check=False)
        if copied.returncode != 0:
            raise ConfigError(f"root {base.name} could not be copied: {copied.stderr.strip()[-_KEPT_OUTPUT:]}")
    uid = machine.uid_range[-1] if machine.uid_range else None
    mount.give(str(folder), uid)
    for command in commands:
        _put_sources(command, folder / _STAGE.lstrip("/"), uid)
        _run(plan, command, base, machine, uid, folder)
        shutil.rmtree(folder / _STAGE.lstrip("/"), ignore_errors=True)


def _put_sources(step: _Command, stage: Path, uid: int | None) -> None:
    """Put a step's files into `stage`, from where the step's process copies them to their destination.

    Of a mode only the owner's right to execute is kept, as in git: the rest depends on who checked the files out.
    """
    for source in step.sources:
        target = stage / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.path is None:
            target.write_text(source.text)
        elif source.kind == "d":
            shutil.copytree(source.path, target, symlinks=True)
        else:
            shutil.copyfile(source.path, target)
            shutil.copymode(source.path, target)
    for path in [path for path in stage.rglob("*") if not path.is_symlink()] if step.sources else []:
        is_executable = path.is_dir() or path.stat().st_mode & 0o100
        path.chmod((0o755 if is_executable else 0o644) if step.mode is None or path.is_dir() else step.mode)
    if step.sources:
        mount.give(str(stage), uid)


def _run(plan: Plan, step: _Command, base: Root | None, machine: Machine, uid: int | None, folder: Path) -> None:
    """Carry out one step in a sandbox that can write to the tree being built, and to nothing else."""
    assert machine.bwrap is not None
    rules = seccomp_program()
    filter_fd = None if rules is None else sealed_file(rules)
    layout = {"how": "build", "lower": str(folder), "trees": {}, "uid": uid, "bytes": 1 << 20}
    inside_id = "0" if step.as_root else AGENT_ID
    argv = [*mount_argv(layout), *drop_argv(machine, uid), machine.bwrap, "--unshare-all", "--new-session"]
    argv += ["--die-with-parent", "--cap-drop", "ALL", "--uid", inside_id, "--gid", inside_id, "--hostname", "box"]
    argv += ["--seccomp", str(filter_fd)] if filter_fd is not None else []
    argv += ["--bind", mount.ROOT, "/"]
    argv += ["--proc", "/proc", "--dev", "/dev"] if base is not None and base.programs else programs_of_host(machine)
    argv += ["--chdir", step.workdir, "--clearenv"]
    home = {"HOME": "/root", "USER": "root", "LOGNAME": "root"} if step.as_root else {}
    fixed = {**ENVIRONMENT, **home, "TAR_OPTIONS": "--no-same-owner"}  # there is no other user to own files
    for name, value in {**fixed, **(base.env if base else {}), **step.env}.items():
        argv += ["--setenv", name, value]
    try:
        done = subprocess.run(
            [*argv, "--", *step.argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_RUN_TIMEOUT_S, check=False, pass_fds=[] if filter_fd is None else [filter_fd],
            env={"PATH": os.environ.get("PATH", "")}, cwd="/",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{plan.path}, line {step.line}: it did not end within {_RUN_TIMEOUT_S:g} s") from error
    finally:
        if filter_fd is not None:
            os.close(filter_fd)
    if done.returncode != 0:
        log = done.stdout.decode("utf-8", "replace").strip()[-_KEPT_OUTPUT:]
        raise ConfigError(
            f"{plan.path}, line {step.line}: exit code {done.returncode} (a build has no network, and one user): {log}"
        )
