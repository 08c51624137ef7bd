"""Write the command lines of the two layers of bubblewrap: files, users and variables that a sandbox shows."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from backtalk.sandboxes.base import DEFAULT_PATH, HOME, SandboxLimits
from backtalk.sandboxes.bubblewrap import mount
from backtalk.sandboxes.machine.probe import Machine
from backtalk.sandboxes.root import ETC_WITH_CODE, PROGRAM_FOLDERS, Root

AGENT_ID = "1000"
SIZE_SINCE, DISABLE_USERNS_SINCE = (0, 7), (0, 8)  # the versions of bubblewrap in which these options came
ENVIRONMENT = {
    "HOME": HOME,
    "USER": "agent",
    "LOGNAME": "agent",
    "SHELL": "/bin/bash",
    "PATH": DEFAULT_PATH,
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TERM": "dumb",
}
RESERVE_FILE = "/run/reserve"
RESERVE_BYTES = 1 << 20
_PROGRAMS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # on most systems links into /usr
# bubblewrap in a chosen root. It lies in "/" itself, so that an agent can rename no folder above it.
_TOOLS = "/.bwrap"
USR_SRC = "/usr/src"  # without programs, so that a session has one of its own there, to write to
_OWN_USR_SRC = "/run/usr-src"
# Folders that images have and that programs of this machine would look for.
IMAGE_FOLDERS = (
    "/app", "/logs", "/mnt", "/opt", "/root", "/srv", "/tests", "/var/backups", "/var/cache", "/var/lib", "/var/log",
    "/var/mail", "/var/spool/cron/crontabs", "/var/www",
    *(f"/etc/cron.{name}" for name in ("d", "daily", "hourly", "monthly", "weekly")),
    *(f"/etc/{name}" for name in ("default", "init.d", "logrotate.d", "profile.d", "sudoers.d", "systemd/system")),
)  # fmt: skip
_FOLDERS = (HOME, "/run", *IMAGE_FOLDERS)
LINKS_OF_HOST = {"/etc/localtime": "/usr/share/zoneinfo/UTC", "/etc/os-release": "../usr/lib/os-release"}
_SHARED_FOLDERS = ("/run/shm", "/tmp", "/var/tmp")
# Written by the holder; the session mounts them read-only.
FIXED_FILES = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/bash\nagent:x:1000:1000:agent:/home/agent:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "/etc/group": "root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost box\n::1 localhost\n",
    "/etc/hostname": "box\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "/etc/ld.so.preload": "",
    RESERVE_FILE: "",
}
# No session, or no verifier, works without them.
SESSION_FOLDERS = (HOME, "/tmp", "/run/shm", "/etc", "/var/tmp", _OWN_USR_SRC)


def outer_argv(
    machine: Machine,
    limits: SandboxLimits,
    uid: int | None,
    *,
    info_fd: int,
    filter_fd: int | None,
    root: Root | None = None,
    readable: Sequence[str] = (),
) -> list[str]:
    """Return the command that starts the holder in its files, network and host name.

    `uid` None keeps the trainer's own. `readable` are folders of this machine, shown read-only at their own paths.
    """
    argv, shown = [], {path: path for path in readable}
    if root is not None:
        argv = _mount_argv(root, limits, uid)
    elif readable and uid is not None:  # another uid may not enter the folders above them, such as /root
        shown = {path: f"{mount.PLACE}/readable{number}" for number, path in enumerate(readable)}
        trees = {place: path for path, place in shown.items()}
        argv = mount_argv({"how": "show", "lower": None, "trees": trees, "uid": uid, "bytes": RESERVE_BYTES})
    argv += drop_argv(machine, uid)
    # Not --die-with-parent: bubblewrap's outer process would die with a trainer killed during a start, and leave
    # its child waiting for ever. The holder ends when its pipe of requests does, and everything with it.
    argv += [machine.bwrap, "--unshare-all", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    argv += ["--uid", AGENT_ID, "--gid", AGENT_ID, "--hostname", "box", "--json-status-fd", str(info_fd)]
    argv += ["--seccomp", str(filter_fd)] if filter_fd is not None else []
    if root is None:
        argv += ["--size", str(_bytes(limits))] if machine.bwrap_version >= SIZE_SINCE else []
        argv += ["--tmpfs", "/"]
    else:
        argv += ["--bind", mount.ROOT, "/"]
    argv += _programs_of_root(root) if root is not None and root.programs else programs_of_host(machine)
    for path, source in shown.items():
        argv += ["--ro-bind", source, path]
    if root is None:
        for path, target in LINKS_OF_HOST.items():
            argv += ["--symlink", target, path]
    for path in _FOLDERS:
        argv += ["--dir", path]
    for path in _SHARED_FOLDERS:
        argv += ["--perms", "1777", "--dir", path]
    return [*argv, "--clearenv", "--setenv", "PATH", DEFAULT_PATH, "--setenv", "LC_ALL", "C", "--"]


def programs_of_host(machine: Machine) -> list[str]:
    """Return options that show this machine's programs, read-only, and the folders of the kernel."""
    argv = ["--ro-bind", "/usr", "/usr"]
    for path in _PROGRAMS:
        argv += ["--ro-bind", path, path] if os.path.exists(path) else []
    if not machine.bwrap.startswith(("/usr/", *(f"{path}/" for path in _PROGRAMS))):
        argv += ["--ro-bind", machine.bwrap, _inner_bwrap(machine)]
    argv += ["--proc", "/proc", "--dev", "/dev", "--dir", "/etc"]
    for path in sorted(str(path) for pattern in ETC_WITH_CODE for path in Path("/etc").glob(pattern)):
        argv += ["--ro-bind", path, path]
    return argv + python_of_host()


def python_of_host() -> list[str]:
    """Return options that show this machine's python3 as python too, where it has none: in a folder that is empty."""
    python3, empty = shutil.which("python3", path=DEFAULT_PATH), "/usr/local/sbin"
    if python3 is None or shutil.which("python", path=DEFAULT_PATH) or not os.path.isdir(empty) or os.listdir(empty):
        return []
    return ["--tmpfs", empty, "--symlink", python3, f"{empty}/python", "--remount-ro", empty]


def _programs_of_root(root: Root) -> list[str]:
    """Return options that show the programs of a chosen root, read-only, and empty folders where it has none."""
    argv, known = [], {place: f"{mount.LOWER}/{source}" for source, place in root.programs}
    for name in PROGRAM_FOLDERS:
        argv += ["--ro-bind", known.get(f"/{name}", mount.EMPTY), f"/{name}"]
    argv += ["--ro-bind", mount.TOOLS, _TOOLS, "--proc", "/proc", "--dev", "/dev"]
    for path in root.etc:
        argv += ["--ro-bind", f"{mount.LOWER}{path}", path]
    for path in _missing_etc(root):
        argv += ["--ro-bind", f"{mount.TOOLS}/{Path(path).name}", path]
    return argv


def _missing_etc(root: Root) -> list[str]:
    """Return files of the loader that the root lacks; an agent could make them and so choose libraries."""
    loaders = [path for top in ("lib", "usr/lib") for path in root.folder.glob(f"{top}/ld-musl-*.so.1")]
    names = {f"/etc/{path.name.removesuffix('.so.1')}.path" for path in loaders} | {"/etc/ld.so.cache"}
    return sorted(names - set(root.etc))


def _mount_argv(root: Root, limits: SandboxLimits, uid: int | None) -> list[str]:
    folders: dict[str, int | None] = dict.fromkeys((*_FOLDERS, "/etc", "/proc", "/dev"))
    if root.programs:
        folders |= dict.fromkeys((*(f"/{name}" for name in PROGRAM_FOLDERS), _TOOLS))
    plan = {
        "how": root.how,
        "lower": str(root.folder),
        "trees": {mount.TOOLS: str(root.tools)} if root.tools else {},
        "uid": uid,
        "bytes": _bytes(limits),
        "folders": folders | dict.fromkeys(_SHARED_FOLDERS, 0o1777),
        "files": [*FIXED_FILES, *(_missing_etc(root) if root.programs else [])],
        "programs": PROGRAM_FOLDERS,
    }
    return mount_argv(plan)


def mount_argv(plan: dict[str, object]) -> list[str]:
    """Return the command that runs `mount`; the command to run after it follows."""
    return [sys.executable, "-I", "-S", mount.__file__, json.dumps(plan)]


def drop_argv(machine: Machine, uid: int | None) -> list[str]:
    """Return the command that runs another one as `uid` without the rights of root; empty where `uid` is None."""
    if uid is None:
        return []
    assert machine.setpriv is not None
    return [machine.setpriv, "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--inh-caps=-all", "--"]


def inner_argv(machine: Machine, *, info_fd: int, root: Root | None = None) -> list[str]:
    """Return the command by which the holder starts a session: processes, devices and variables of its own."""
    argv = [_inner_bwrap(machine)]
    if root is not None and root.programs and root.tools is not None:
        # With its own loader and libraries, unless it is linked statically: those of the root may be another system's.
        loader = [f"{_TOOLS}/loader", "--library-path", _TOOLS] if (root.tools / "loader").exists() else []
        argv = [*loader, f"{_TOOLS}/bwrap"]
    argv += ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try"]
    argv += ["--disable-userns"] if machine.bwrap_version >= DISABLE_USERNS_SINCE else []
    argv += ["--uid", AGENT_ID, "--gid", AGENT_ID, "--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    argv += ["--as-pid-1", "--json-status-fd", str(info_fd), "--dev-bind", "/", "/", "--bind", "/etc", "/etc"]
    for path in FIXED_FILES:
        argv += ["--ro-bind", path if path != RESERVE_FILE else "/dev/null", path]
    usr_src = Path(USR_SRC) if root is None or not root.programs else root.folder / USR_SRC[1:]
    if usr_src.is_dir() and (root is None or not root.programs or not any(usr_src.iterdir())):
        argv += ["--bind", _OWN_USR_SRC, USR_SRC]
    argv += ["--proc", "/proc", "--remount-ro", "/proc"]
    # The devices are the holder's, which no session can change: to make them anew costs a fifth of a restart.
    argv += ["--bind", "/run/shm", "/dev/shm", "--remount-ro", "/dev"]
    argv += ["--chdir", HOME, "--clearenv"]
    for name, value in ENVIRONMENT.items():
        argv += ["--setenv", name, value]
    return [*argv, "--", "bash", "-s"]


def _inner_bwrap(machine: Machine) -> str:
    return machine.bwrap if machine.bwrap.startswith(("/usr/", "/bin/")) else _TOOLS


def _bytes(limits: SandboxLimits) -> int:
    return (limits.disk_mb << 20) + RESERVE_BYTES
