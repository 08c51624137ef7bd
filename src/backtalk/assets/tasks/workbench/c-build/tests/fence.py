"""Runs what the agent wrote apart from the tests: it cannot read /tests, touch /logs or signal its judge (Landlock).

Where the kernel has no Landlock it runs all the same. The same file stands in every task that needs it.
"""

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time

SHUT = ("tests", "logs", "solution")
END_S = time.monotonic() + 90  # for everything that is run; the verifier's own limit has to be above that
_FILE, _ALL = 0b100_0000_0000_0111, 0x7FFF  # rights on a file; on a folder and all that is in it

if __name__ != "__main__":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans of what is run become children of the check, which ends them


def start(command, **options):
    """A process of its own session, shut in. Its output goes nowhere unless `options` say where."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [sys.executable, "-I", __file__, *command], start_new_session=True, **(quiet | {"cwd": "/tmp"} | options)
    )


def run(command, *, given=b"", seconds=20, **options):
    """(exit status, output with errors); the status is None where it took too long. Ends what it leaves running."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output:
        source.write(given)
        source.seek(0)
        process = start(command, stdin=source, stdout=output, **options)
        status = wait(process, seconds)
        end(process)
        output.seek(0)
        return status, output.read(1 << 20)


def wait(process, seconds):
    try:
        return process.wait(max(0.0, min(seconds, END_S - time.monotonic())))
    except subprocess.TimeoutExpired:
        return None


def end(process):
    """End a process with its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def below():
    """Processes that descend from this one; what a dead parent left behind is this one's own child."""
    children = {}
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{int(entry)}/stat") as file:
                children.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(entry))
        except (ValueError, OSError):
            continue
    found = list(children.get(os.getpid(), ()))
    for process in found:
        found += children.get(process, ())
    return found


def sweep():
    """End all of them."""
    until_s = time.monotonic() + 10
    while (found := below()) and time.monotonic() < until_s:
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, os.WNOHANG)
            except OSError:
                pass


def score(**parts):
    """End what still runs, then write the reward: 1 if every part holds, else 0."""
    sweep()
    print(parts)
    with open("/logs/verifier/reward.json", "w") as file:
        json.dump({"reward": float(all(parts.values())), **{name: float(ok) for name, ok in parts.items()}}, file)


def _shut_in():
    """Landlock for this process and all its children; best effort."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    handled = 0x1FFF | (0x2000 if abi > 1 else 0) | (0x4000 if abi > 2 else 0)
    rules = struct.pack("=QQQ", handled, 0, 0b11 if abi > 5 else 0)  # the last: no signals to those outside
    ruleset = libc.syscall(444, rules, ctypes.c_size_t(24 if abi > 5 else 8), 0)
    if ruleset < 0:
        return
    for name in set(os.listdir("/")) - set(SHUT):
        try:
            place = os.open(f"/{name}", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = (_ALL if os.path.isdir(f"/{name}") else _FILE) & handled
        libc.syscall(445, ruleset, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, which Landlock asks for
    libc.syscall(446, ruleset, 0)
    os.close(ruleset)


if __name__ == "__main__":
    _shut_in()
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
