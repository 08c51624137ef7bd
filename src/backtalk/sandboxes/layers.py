"""The command lines of the two bubblewrap layers: what the sandbox's machine looks like."""

from __future__ import annotations

import os
from pathlib import Path

from backtalk.sandboxes.base import SandboxLimits
from backtalk.sandboxes.exec_server import DEFAULT_PATH
from backtalk.sandboxes.probe import Machine

HOME = "/home/agent"
AGENT_ID = "1000"
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
# Folders of /etc that programs in /usr look into for code. An agent's own must not take their place.
_ETC_OF_HOST = ("alternatives", "ld.so.cache", "perl", "python3*", "java*")
_FOLDERS = (HOME, "/app", "/logs", "/opt", "/root", "/run", "/srv", "/tests", "/var/cache", "/var/lib", "/var/log")
_SHARED_FOLDERS = ("/run/shm", "/tmp", "/var/tmp")
# Made by the holder; the session mounts them over themselves, read-only.
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
SESSION_FOLDERS = (HOME, "/tmp", "/run/shm", "/etc", "/var/tmp")  # no session, or no verifier, works without them


def outer_argv(
    machine: Machine, limits: SandboxLimits, uid: int | None, *, info_fd: int, filter_fd: int | None
) -> list[str]:
    """What starts the holder: files, network, host name. `uid` None keeps the trainer's own."""
    assert machine.bwrap is not None
    argv = drop_argv(machine, uid)
    # Not --die-with-parent: a trainer killed during a start would take bubblewrap's outer process with it before that
    # lets its child go on, which would then wait for ever. The holder ends when its requests do, and all with it.
    argv += [machine.bwrap, "--unshare-all", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    argv += ["--uid", AGENT_ID, "--gid", AGENT_ID, "--hostname", "box", "--json-status-fd", str(info_fd)]
    argv += ["--seccomp", str(filter_fd)] if filter_fd is not None else []
    argv += ["--size", str((limits.disk_mb << 20) + RESERVE_BYTES)] if has_size(machine) else []
    argv += ["--tmpfs", "/", "--ro-bind", "/usr", "/usr"]
    for path in _PROGRAMS:
        argv += ["--ro-bind", path, path] if os.path.exists(path) else []
    if not machine.bwrap.startswith(("/usr/", *(f"{path}/" for path in _PROGRAMS))):
        argv += ["--ro-bind", machine.bwrap, _inner_bwrap(machine)]
    argv += ["--proc", "/proc", "--dev", "/dev", "--dir", "/etc"]
    for path in _etc_of_host():
        argv += ["--ro-bind", path, path]
    argv += ["--symlink", "/usr/share/zoneinfo/UTC", "/etc/localtime"]
    argv += ["--symlink", "../usr/lib/os-release", "/etc/os-release"]
    for path in _FOLDERS:
        argv += ["--dir", path]
    for path in _SHARED_FOLDERS:
        argv += ["--perms", "1777", "--dir", path]
    return [*argv, "--clearenv", "--setenv", "PATH", DEFAULT_PATH, "--setenv", "LC_ALL", "C", "--"]


def drop_argv(machine: Machine, uid: int | None) -> list[str]:
    """What runs a command as `uid` without root's rights; nothing where that is None."""
    if uid is None:
        return []
    assert machine.setpriv is not None
    return [machine.setpriv, "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--inh-caps=-all", "--"]


def inner_argv(machine: Machine, *, info_fd: int) -> list[str]:
    """What the holder starts a session with: processes, devices, environment, over the holder's files."""
    argv = [_inner_bwrap(machine), "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try"]
    argv += ["--disable-userns"] if has_disable_userns(machine) else []
    argv += ["--uid", AGENT_ID, "--gid", AGENT_ID, "--cap-drop", "ALL", "--die-with-parent", "--new-session"]
    argv += ["--as-pid-1", "--json-status-fd", str(info_fd), "--bind", "/", "/", "--bind", "/etc", "/etc"]
    for path in FIXED_FILES:
        argv += ["--ro-bind", path if path != RESERVE_FILE else "/dev/null", path]
    argv += ["--proc", "/proc", "--remount-ro", "/proc"]
    argv += ["--dev", "/dev", "--bind", "/run/shm", "/dev/shm", "--remount-ro", "/dev"]
    argv += ["--chdir", HOME, "--clearenv"]
    for name, value in ENVIRONMENT.items():
        argv += ["--setenv", name, value]
    return [*argv, "--", "bash", "-s"]


def has_size(machine: Machine) -> bool:
    """Whether this bubblewrap can limit the tree's size."""
    return machine.bwrap_version >= (0, 7)


def has_disable_userns(machine: Machine) -> bool:
    """Whether this bubblewrap can forbid further user namespaces inside."""
    return machine.bwrap_version >= (0, 8)


def _inner_bwrap(machine: Machine) -> str:
    assert machine.bwrap is not None
    return machine.bwrap if machine.bwrap.startswith(("/usr/", "/bin/")) else "/run/bwrap"


def _etc_of_host() -> list[str]:
    return sorted(str(path) for pattern in _ETC_OF_HOST for path in Path("/etc").glob(pattern))
