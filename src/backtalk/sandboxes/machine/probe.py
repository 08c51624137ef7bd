"""Look for what this machine has to isolate commands with, and say what to install where it lacks something."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from backtalk.errors import BacktalkError, SandboxUnavailable
from backtalk.sandboxes.machine.cgroup import CgroupParents, find_parents

# As root every sandbox runs under a host uid of its own: above those that containers and people are given.
_FIRST_UID = 1_900_000_000
_UID_COUNT = 100_000
_TRIAL_TIMEOUT_S = 30.0
_MIN_BUBBLEWRAP = (0, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The properties of this machine that sandboxes depend on."""

    bwrap: str  # its path; "" where it is not installed
    bwrap_version: tuple[int, ...] = ()
    setpriv: str | None
    bash: str | None
    uid: int
    uid_range: range  # host uids for sandboxes; empty: they keep our own
    cgroups: CgroupParents
    blocked_by: str | None = None  # what to change, where a setting forbids what bubblewrap needs


# Trainings that are started together have neighbouring process ids, so each begins far from the next.
_uids_given = itertools.count(os.getpid() * 1009)


def next_uid(uids: range) -> int | None:
    """Return a host uid for a new sandbox, in turn; None where there is none to give."""
    return uids[next(_uids_given) % len(uids)] if uids else None


def probe(*, use_cgroups: bool = True) -> Machine:
    """Look at this machine. Starts two short processes and changes nothing."""
    bwrap = shutil.which("bwrap") or ""
    return Machine(
        bwrap=bwrap,
        bwrap_version=_version(bwrap) if bwrap else (),
        setpriv=shutil.which("setpriv"),
        bash=shutil.which("bash"),
        uid=os.getuid(),
        uid_range=_uid_range() if os.getuid() == 0 else range(0),
        cgroups=find_parents() if use_cgroups else CgroupParents(0),
        blocked_by=_blocked_by(),
    )


def require_bubblewrap(machine: Machine) -> None:
    """Check that bubblewrap and the programs that start it are installed.

    Raises:
        SandboxUnavailable: one is missing or too old; the message says what to install.
    """
    if not machine.bwrap or machine.bash is None or (machine.uid_range and machine.setpriv is None):
        raise SandboxUnavailable(f"no safe sandbox on this machine: {advice(machine)}")
    if machine.bwrap_version < _MIN_BUBBLEWRAP:
        version = ".".join(map(str, machine.bwrap_version))
        raise SandboxUnavailable(
            f"{machine.bwrap} is version {version or 'unknown'}; install bubblewrap 0.8 or newer (0.5 at least)"
        )


def run_trial(start: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run a trial start, in a thread since the caller may be inside an event loop.

    Raises:
        SandboxUnavailable: it failed; the message says why.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="sandbox-trial") as thread:
        try:
            thread.submit(asyncio.run, asyncio.wait_for(start(), _TRIAL_TIMEOUT_S)).result()
        except (BacktalkError, OSError) as error:  # a time-out is an OSError
            raise SandboxUnavailable(str(error) or "no answer in time") from error


def advice(machine: Machine) -> str:
    """Return advice, in words, on how to make bubblewrap work here."""
    if not machine.bwrap:
        return "install bubblewrap (apt install bubblewrap, dnf install bubblewrap, or apk add bubblewrap)"
    if machine.bash is None:
        return "install bash: every command of a task runs in it"
    if machine.uid == 0 and machine.setpriv is None:
        return "install setpriv (apt install util-linux), or run as an ordinary user: as root it drops root's rights"
    if machine.blocked_by is not None:
        return machine.blocked_by
    return (
        "allow user namespaces: in Docker run with --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined --security-opt systempaths=unconfined; elsewhere check `unshare -Ur true`"
    )


def _version(bwrap: str) -> tuple[int, ...]:
    output = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", output)
    return tuple(int(part) for part in found.groups()) if found else ()


def _uid_range() -> range:
    """Return the uids that root can give to sandboxes; in the user namespace of a container there may be none."""
    best = range(0)
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = (int(word) for word in line.split())
        last = first + count
        if first <= _FIRST_UID and last >= _FIRST_UID + _UID_COUNT:
            return range(_FIRST_UID, _FIRST_UID + _UID_COUNT)
        mapped = range(max(first, 10_000, last - _UID_COUNT), last)
        best = max(best, mapped, key=len)
    return best


def _blocked_by() -> str | None:
    def setting(name: str) -> str:
        try:
            return Path("/proc/sys", name).read_text().strip()
        except OSError:
            return ""

    if setting("user/max_user_namespaces") == "0":
        return "run `sysctl -w user.max_user_namespaces=10000` as root: user namespaces are switched off"
    if os.getuid() == 0:
        return None
    if setting("kernel/unprivileged_userns_clone") == "0":
        return "run `sysctl -w kernel.unprivileged_userns_clone=1` as root: user namespaces are for root only here"
    if setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "run `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` as root, or give bwrap an AppArmor profile "
            "with `userns,` (Ubuntu: apt install apparmor-profiles, then load bwrap-userns-restrict)"
        )
    return None
