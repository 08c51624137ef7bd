"""Builds the root that a Dockerfile asks for: commands run in a sandbox of their own, over a copy of the base.

They run without a network as one user of the host, who is root inside and owns every file; after USER with another
name he is uid 1000. A program that wants to give files to somebody else fails. Over this machine's own programs,
``/usr`` and its like are read-only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
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
from backtalk.sandboxes.images.plan import STAGE, Plan, Source, Step
from backtalk.sandboxes.machine.probe import Machine
from backtalk.sandboxes.machine.seccomp import seccomp_program
from backtalk.sandboxes.root import Root, cached, digest_of_file, of_folder
from backtalk.sandboxes.session.pipes import sealed_file

_FORMAT = "1"  # another one where the same text would be built otherwise
_RUN_TIMEOUT_S = 1800.0
_KEPT_OUTPUT = 2000


def build_root(plan: Plan, base: Root | None, machine: Machine) -> Root:
    """The root that `plan` describes, over `base` (None: this machine's programs), from the cache or built now.

    Raises:
        ConfigError: a command failed; nothing is left of it.
    """
    place = cached(f"build-{_digest(plan, base)}", lambda folder: _build(plan, base, machine, folder))
    name = f"{plan.path} (FROM {plan.image}: {base.name if base else 'programs of this machine'})"
    known = Root(name=name, folder=place)
    if base is not None and base.programs:
        known = of_folder(place, machine, name)
    workdir = plan.workdir if plan.has_workdir else base.workdir if base else None
    return replace(known, env={**(base.env if base else {}), **plan.env}, workdir=workdir)


def _digest(plan: Plan, base: Root | None) -> str:
    """Of everything that the built tree depends on."""
    digest = hashlib.sha256(f"{_FORMAT} {_identity(base)}".encode())
    for step in plan.steps:
        digest.update(repr((step.argv, sorted(step.env.items()), step.workdir, step.as_root, step.mode)).encode())
        for source in step.sources:
            digest.update(repr((source.kind, source.name, source.text)).encode())
            for path in _files(source):
                content = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else digest_of_file(path)
                mode = 0 if path.is_symlink() else path.stat().st_mode & 0o100
                digest.update(repr((str(path.relative_to(source.path or path)), mode, content)).encode())
    return digest.hexdigest()[:32]


def _files(source: Source) -> list[Path]:
    if source.path is None:
        return []
    return sorted(source.path.rglob("*")) if source.kind == "d" else [source.path]


def _identity(base: Root | None) -> str:
    """What tells one base from another: what a cached one was made of, what lies in a folder."""
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


def _build(plan: Plan, base: Root | None, machine: Machine, folder: Path) -> None:
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
    _give(folder, uid)
    for step in plan.steps:
        _stage(step, folder / STAGE.lstrip("/"), uid)
        _run(plan, step, base, machine, uid, folder)
        shutil.rmtree(folder / STAGE.lstrip("/"), ignore_errors=True)


def _stage(step: Step, stage: Path, uid: int | None) -> None:
    """Lay a step's files down beside the tree's own; from there a process inside takes them where they belong.

    Of a mode only whether the owner may run a file is taken, as git does: the rest depends on who checked it out.
    """
    for source in step.sources:
        to = stage / source.name
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.path is None:
            to.write_text(source.text)
        elif source.kind == "d":
            shutil.copytree(source.path, to, symlinks=True)
        else:
            shutil.copyfile(source.path, to)
            shutil.copymode(source.path, to)
    for path in [path for path in stage.rglob("*") if not path.is_symlink()] if step.sources else []:
        runs = path.is_dir() or path.stat().st_mode & 0o100
        path.chmod((0o755 if runs else 0o644) if step.mode is None or path.is_dir() else step.mode)
    if step.sources:
        _give(stage, uid)


def _give(tree: Path, uid: int | None) -> None:
    if uid is not None:
        os.lchown(tree, uid, uid)
        for folder, names, files in os.walk(tree):
            for name in (*names, *files):
                os.lchown(f"{folder}/{name}", uid, uid)


def _run(plan: Plan, step: Step, base: Root | None, machine: Machine, uid: int | None, folder: Path) -> None:
    """Carry one step out in a sandbox that can write to the tree being built, and to nothing else.

    Raises:
        ConfigError: it failed.
    """
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
    fixed = {**ENVIRONMENT, **home, "TAR_OPTIONS": "--no-same-owner"}  # there is nobody else to give files to
    for name, value in {**fixed, **(base.env if base else {}), **step.env}.items():
        argv += ["--setenv", name, value]
    try:
        done = subprocess.run(
            [*argv, "--", *step.argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_RUN_TIMEOUT_S, check=False, pass_fds=[] if filter_fd is None else [filter_fd],
            env={"PATH": os.environ.get("PATH", "")}, cwd="/",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{plan.path}, line {step.line}: no end within {_RUN_TIMEOUT_S:g} s") from error
    finally:
        if filter_fd is not None:
            os.close(filter_fd)
    if done.returncode != 0:
        said = done.stdout.decode("utf-8", "replace").strip()[-_KEPT_OUTPUT:]
        raise ConfigError(
            f"{plan.path}, line {step.line}: exit code {done.returncode} (a build has no network, and one user): {said}"
        )
