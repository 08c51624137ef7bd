"""A program that mounts a chosen root in a mount namespace of its own, and then runs a command there.

    python -I -S mount.py PLAN COMMAND...

PLAN is JSON, written by `layers`. The command, bubblewrap, finds under ``/tmp``, in memory and unseen by others:
``lower``, the chosen root; ``root``, the tree that the sandbox writes to; ``empty``, and what PLAN names.

It is no part of the trainer, which has threads and must neither fork nor change its own namespaces. It imports nothing
of Backtalk, so it starts fast. Started by root it keeps root's rights, which the command gives up. Started by a user it
is root of a user namespace of its own.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import sys

PLACE = "/tmp"  # exists everywhere, and is what bubblewrap itself mounts over
LOWER, UPPER, ROOT, EMPTY, TOOLS = (f"{PLACE}/{name}" for name in ("lower", "upper", "root", "empty", "tools"))

# linux/sched.h, linux/mount.h, linux/fcntl.h, asm-generic/unistd.h (these calls have one number everywhere)
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_NO_SUID_NO_DEV, _BIND, _PRIVATE = 2 | 4, 4096, 0x4000 | 0x40000
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_CLONE, _RECURSIVE, _EMPTY_PATH, _HERE = 1 | os.O_CLOEXEC, 0x8000, 0x1000, -100
_ID_MAPPED = 0x00100000
_libc = ctypes.CDLL(None, use_errno=True)


def main(plan: dict, command: list[str]) -> None:
    """Mount what the plan says and replace this process by the command."""
    by_root, owner, how = os.getuid() == 0, plan["uid"], plan["how"]
    _new_namespaces(by_root)
    # Opened before anything is mounted, since they may lie in /tmp. A user must take along the mounts below them.
    flags = _CLONE if by_root else _CLONE | _RECURSIVE
    paths = ({LOWER: plan["lower"]} if plan["lower"] else {}) | plan["trees"]
    trees = {place: _call("open_tree", _OPEN_TREE, _HERE, path.encode(), flags) for place, path in paths.items()}
    if how == "overlay" and owner is not None:
        _show_as(trees[LOWER], os.stat(plan["lower"]), owner)
    _mount("tmpfs", PLACE, f"size={plan['bytes']},mode=0755")
    os.umask(0o022)
    for place, tree in trees.items():
        os.mkdir(place)
        _call("move_mount", _MOVE_MOUNT, tree, b"", _HERE, place.encode(), 4)  # MOVE_MOUNT_F_EMPTY_PATH
        os.close(tree)
    os.mkdir(EMPTY)
    os.mkdir(ROOT)
    match how:
        case "overlay":
            _furnish(UPPER, plan)
            give(UPPER, owner)
            _overlay()
        case "copy":
            _copy(LOWER, ROOT, plan["programs"])
            _furnish(ROOT, plan)
            give(ROOT, owner)
        case "build":  # what is written stays
            _check(_libc.mount(LOWER.encode(), ROOT.encode(), None, _BIND, None), "mount")
    os.chdir("/")
    os.execvp(command[0], command)


def _new_namespaces(by_root: bool) -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEW_MOUNTS if by_root else _NEW_MOUNTS | _NEW_USER), "unshare")
    if not by_root:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
    _check(_libc.mount(None, b"/", None, _PRIVATE, None), "mount")


def _show_as(tree: int, below: os.stat_result, owner: int) -> None:
    """Show files of the chosen root's owner as files of `owner`, in this mount alone (an idmapped mount)."""
    ready, stay = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(stay[1])  # so that the read below ends when the parent does
        os.write(ready[1], b"x" if _libc.unshare(_NEW_USER) == 0 else b"-")
        os.read(stay[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        _write(f"/proc/{child}/uid_map", f"{below.st_uid} {owner} 1")
        _write(f"/proc/{child}/gid_map", f"{below.st_gid} {owner} 1")
        namespace = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for end in (*ready, *stay):
        os.close(end)
    attributes = (ctypes.c_uint64 * 4)(_ID_MAPPED, 0, 0, namespace)  # set, clear, propagation, userns_fd
    _call("mount_setattr", _MOUNT_SETATTR, tree, b"", _EMPTY_PATH, attributes, ctypes.sizeof(attributes))
    os.close(namespace)


def _overlay() -> None:
    os.mkdir(f"{PLACE}/work")
    options = f"lowerdir={LOWER},upperdir={UPPER},workdir={PLACE}/work"
    try:
        os.setxattr(UPPER, "trusted.backtalk", b"")
    except OSError:
        # In a user namespace overlayfs must use attributes that a user may write. Before Linux 6.6 files in memory have
        # none: it would mount, but no folder could replace one that was removed. This line fails then.
        os.setxattr(UPPER, "user.backtalk", b"")
        options += ",userxattr"
    _mount("overlay", ROOT, options)


def _furnish(tree: str, plan: dict) -> None:
    """Make the folders and files that a sandbox needs, replacing what the chosen root has in their place."""
    for path, mode in plan["folders"].items():
        below, made = LOWER, tree
        for name in ("", *path.strip("/").split("/")):
            below, made = os.path.join(below, name), os.path.join(made, name)
            _folder(made, below)
        if mode is not None:
            os.chmod(made, mode)
    for path in plan["files"]:
        if os.path.lexists(tree + path):
            os.remove(tree + path)
        os.close(os.open(tree + path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))


def _folder(made: str, below: str) -> None:
    if os.path.lexists(made) and (os.path.islink(made) or not os.path.isdir(made)):
        os.remove(made)
    if not os.path.isdir(made):
        os.mkdir(made)
        if os.path.isdir(below) and not os.path.islink(below):
            os.chmod(made, stat.S_IMODE(os.stat(below).st_mode) | 0o700)


def give(tree: str, owner: int | None) -> None:
    """Change the owner of a whole tree; None keeps it."""
    if owner is not None:
        os.lchown(tree, owner, owner)
        for folder, names, files in os.walk(tree):
            for name in (*names, *files):
                os.lchown(f"{folder}/{name}", owner, owner)


def _copy(source: str, target: str, without: list[str]) -> None:
    """Copy a folder except for the entries named in `without`, and for pipes, sockets and devices."""
    import shutil  # slow to load, and seldom wanted

    for entry in os.scandir(source):
        made, state = f"{target}/{entry.name}", entry.stat(follow_symlinks=False)
        if entry.name in without:
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), made)
        elif entry.is_dir():
            os.mkdir(made)
            _copy(entry.path, made, [])
            os.chmod(made, stat.S_IMODE(state.st_mode) | 0o700)
        elif entry.is_file():
            shutil.copyfile(entry.path, made)
            os.chmod(made, stat.S_IMODE(state.st_mode))
            os.utime(made, ns=(state.st_atime_ns, state.st_mtime_ns))


def _mount(kind: str, place: str, options: str) -> None:
    name = kind.encode()
    _check(_libc.mount(name, place.encode(), name, _NO_SUID_NO_DEV, options.encode()), f"mount {kind}")


def _call(name: str, number: int, *arguments: object) -> int:
    return _check(_libc.syscall(number, *arguments), name)


def _check(answer: int, name: str) -> int:
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return answer


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]), sys.argv[2:])
    except OSError as error:
        full = "; what it holds outside of its programs is larger than the sandbox's disk" * (
            error.errno == errno.ENOSPC
        )
        sys.exit(f"the chosen root could not be put together: {error}{full}")
