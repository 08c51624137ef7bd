"""Measure what the start of a local sandbox consists of: processes, namespaces, mounts. Prints a table in Markdown.

    python benchmarks/sandbox_start.py --repeats 60

Each row runs the parts of the row above it and one more, from a bare program to both layers of bubblewrap with a shell.
Processor time is what stays comparable on a busy machine; the kernel counts it in ticks, so only means over many
repeats say anything.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time

from backtalk.sandboxes.base import SandboxLimits
from backtalk.sandboxes.bubblewrap.layers import FIXED_FILES, drop_argv, inner_argv, outer_argv
from backtalk.sandboxes.machine.probe import Machine, next_uid, probe

BASH = ["bash", "--norc", "--noprofile", "-c"]
NAMESPACES = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
SMALL = (
    "--as-pid-1 --tmpfs / --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64"
)


def cases(machine: Machine, notes: tuple[int, int]) -> dict[str, list[str]]:
    """Return the commands to time by name; both layers write their notes into a file of their own."""
    uid = next_uid(machine.uid_range)
    drop = drop_argv(machine, uid)
    outer = outer_argv(machine, SandboxLimits(), uid, info_fd=notes[0], filter_fd=None)
    inner = inner_argv(machine, info_fd=notes[1])
    inner = [*inner[: inner.index("--")], "--", *BASH, ":"]
    holder = "".join(f": >{path}; " for path in FIXED_FILES) + 'mkdir -p /run/usr-src; exec "$@"'
    small = [*drop, machine.bwrap, *NAMESPACES, *SMALL.split()]
    return {
        "a program": ["/bin/true"],
        "bash": [*BASH, ":"],
        "a program under another uid": [*drop, "/bin/true"],
        "bubblewrap: namespaces but the network, one mount": [*small, "--", "/usr/bin/true"],
        "the network too": [*small, "--unshare-net", "--", "/usr/bin/true"],
        "outer layer: its mounts, bash": [*outer, *BASH, ":"],
        "both layers: a second bubblewrap, bash": [*outer, *BASH, holder, "holder", *inner],
    }


def once(command: list[str], notes: tuple[int, int]) -> tuple[float, float]:
    """Return milliseconds of processor and of the clock that a command took."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, pass_fds=notes, stdin=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return 1e3 * cpu, 1e3 * seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args()
    machine, load = probe(use_cgroups=False), os.getloadavg()[0]
    notes = os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
    commands = cases(machine, notes)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            times[name].append(once(command, notes))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, load {load:.1f} before\n")
    print("| started | processor, mean ms | clock, median ms | clock, least ms |\n|---|---|---|---|")
    for name, rows in times.items():
        cpu, clock = zip(*rows, strict=True)
        print(f"| {name} | {statistics.mean(cpu):.1f} | {statistics.median(clock):.1f} | {min(clock):.1f} |")


if __name__ == "__main__":
    main()
