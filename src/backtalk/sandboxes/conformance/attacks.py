"""Checks of attacks on the kernel, on this machine and on other rollouts on it.

Each attack does no harm where it succeeds: a file is opened and not written, a setting is set to what it is, a system
call gets arguments that it would refuse next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from backtalk.errors import SandboxError
from backtalk.sandboxes.base import HOME
from backtalk.sandboxes.conformance.base import (
    NotApplicable,
    SandboxUnderTest,
    equal,
    expect,
    folder_of_machine,
    processes_with,
)

# Numbers of system calls (Linux, asm/unistd) on x86_64 and aarch64.
_CALLS = {
    "keyctl": (250, 219), "add_key": (248, 217), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "kexec_load": (246, 104), "init_module": (175, 105),
    "delete_module": (176, 106), "swapon": (167, 224), "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116),
    "open_by_handle_at": (304, 265), "unshare": (272, 97), "setns": (308, 268), "pivot_root": (155, 41),
}  # fmt: skip
_REFUSED = (1, 13, 38)  # EPERM, EACCES, ENOSYS: any other errno is from beyond the check of rights


async def _refused(sandbox: SandboxUnderTest, *calls: str) -> None:
    """Fail unless the system calls, each a name and its arguments in Python, are refused as such."""
    program = f"""
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
column = {{'x86_64': 0, 'aarch64': 1}}.get(platform.machine())
if column is None: print('unknown machine')
def call(name, *arguments):
    got = libc.syscall({_CALLS!r}[name][column], *arguments)
    if got != -1 or ctypes.get_errno() not in {_REFUSED}: print(name, got, ctypes.get_errno())
if column is not None:
    {"; ".join(f"call({call})" for call in calls)}
"""
    printed = await sandbox.python(program)
    if "unknown machine" in printed:
        raise NotApplicable("the numbers of the system calls are not known for this processor")
    equal(printed, "", "not refused")


async def _fail(sandbox: SandboxUnderTest, *commands: str) -> None:
    """Fail unless every command fails."""
    for command in commands:
        await sandbox.fails(f"timeout 10 {command}", f"`{command}` succeeded")


async def kernel_settings(sandbox: SandboxUnderTest) -> None:
    """Check that no kernel setting and no request to the kernel can be written: /proc/sys, /sys, sysrq."""
    opened = "[[ -f $f ]] && { : >>$f; } 2>/dev/null && echo $f"  # access(2) alone may be told anything
    writable = "find /proc/sys /sys -writable 2>/dev/null"
    await sandbox.prints(f"{writable} | while read -r f; do {opened}; done | head -n 3", "")
    special = "/proc/sysrq-trigger /proc/sys/kernel/modprobe /proc/sys/kernel/hostname /proc/sys/vm/drop_caches"
    await sandbox.prints(f"for f in {special} /proc/irq/*/smp_affinity /proc/acpi/*; do {opened}; done", "")


async def namespaces(sandbox: SandboxUnderTest) -> None:
    """Check that no other namespace can be made or entered, and the root folder cannot be changed."""
    kinds = (0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000, 0x02000000)  # mount uts ipc pid net cgroup
    await _refused(sandbox, *(f"'unshare', {kind}" for kind in kinds), "'pivot_root', b'/tmp', b'/tmp'")
    await _fail(sandbox, "chroot / true", "nsenter -t 1 -m true", "nsenter -t 1 -U true", "nsenter -t 1 -n true")


async def capabilities(sandbox: SandboxUnderTest) -> None:
    """Check that no process inside has a capability, and none can get one."""
    sets = await sandbox.output("grep -E '^Cap(Prm|Eff|Bnd|Inh|Amb)' /proc/self/status | cut -f2 | sort -u")
    equal(sets, "0" * 16 + "\n", "capability sets")


async def setuid_programs(sandbox: SandboxUnderTest) -> None:
    """Check that programs whose mode says to run them as their owner do not: no process gets new privileges."""
    await sandbox.prints("grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1\n")
    await _fail(sandbox, "su -c true </dev/null", "sudo -n true", "mount -l -t none /x")


async def not_root_outside(sandbox: SandboxUnderTest) -> None:
    """Check that the agent's processes belong to an ordinary user of this machine."""
    mark = secrets.token_hex(8)
    await sandbox.exec(f"bash -c 'sleep 60; :' {mark} & sleep 0.2")
    owners = {path.stat().st_uid for path in processes_with(mark)}
    if not owners:
        raise NotApplicable("its processes are not visible on this machine")
    expect(0 not in owners, "its processes run as root of this machine")


async def devices(sandbox: SandboxUnderTest) -> None:
    """Check that no device can be made, and those in /dev are harmless."""
    await _fail(sandbox, "mknod disk b 8 0", "mknod memory c 1 1", "mknod /dev/kmsg c 1 11")
    harmless = "null zero full random urandom tty console ptmx pts shm mqueue fd stdin stdout stderr core".split()
    there = set((await sandbox.output("ls /dev")).split())
    equal(sorted(there - set(harmless)), [], "devices")


async def memory_of_the_machine(sandbox: SandboxUnderTest) -> None:
    """Check that the machine's memory cannot be read as a file."""
    for path in ("/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore", "/proc/kpagecount", "/proc/vmcore"):
        await sandbox.fails(f"exec 9<{path}", f"{path} can be opened")


async def kernel_log(sandbox: SandboxUnderTest) -> None:
    """Check that the kernel's log, which holds addresses and facts of the machine, cannot be read."""
    await _fail(sandbox, "dmesg", "head -c 1 /dev/kmsg", "head -c 1 /proc/kmsg")
    await _refused(sandbox, "'syslog', 3, None, 0")


async def clock(sandbox: SandboxUnderTest) -> None:
    """Check that the machine's clock cannot be set."""
    await _fail(sandbox, "date -s @$(date +%s)")
    equal(await sandbox.attempts("import time", "time.clock_settime(time.CLOCK_REALTIME, time.time())"), [])


async def host_name(sandbox: SandboxUnderTest) -> None:
    """Check that the host name cannot be set, and is not this machine's."""
    await _fail(sandbox, 'hostname "$(hostname)"')
    expect((await sandbox.output("uname -n")).strip() != os.uname().nodename, "it has this machine's name")


async def foreign_system_calls(sandbox: SandboxUnderTest) -> None:
    """Check that calls by the numbers of another architecture, which a filter might not know, are refused."""
    program = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
if platform.machine() != 'x86_64': print('unknown machine')
elif libc.syscall(0x40000000 + 39) != -1: print('x32')
"""
    printed = await sandbox.python(program)
    if "Bad system call" in printed:  # it was killed for it, and bash repeats the program
        return
    if "unknown machine" in printed:
        raise NotApplicable("x86_64 alone has such calls")
    equal(printed, "")


async def priorities(sandbox: SandboxUnderTest) -> None:
    """Check that no process can give itself priority over others of this machine."""
    nice = "os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) - 1)"  # a trainer may be at -5 itself
    fifo = "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    equal(await sandbox.attempts("import os", nice, fifo), [])


async def raised_limits(sandbox: SandboxUnderTest) -> None:
    """Check that a limit in force cannot be raised again: processes, file size, open files."""
    raise_it = "[[ $(ulimit -H$f) != unlimited ]] && ulimit -H$f unlimited && echo $f"
    await sandbox.prints(f"for f in u f n; do {raise_it}; done 2>/dev/null", "")
    expect((await sandbox.output("ulimit -Hu")).strip() != "unlimited", "processes are not limited at all")


async def programs_of_the_machine(sandbox: SandboxUnderTest) -> None:
    """Check that the programs and libraries that this machine runs cannot be written."""
    folders = ("/usr/bin", "/bin", "/sbin", "/lib", "/usr/lib", "/usr/local/bin")
    await _fail(sandbox, *(f"touch {folder}/backtalk-conformance" for folder in folders))
    await _fail(sandbox, "truncate -s +0 /usr/bin/env", "truncate -s +0 /bin/bash")


async def secrets_in_the_environment(sandbox: SandboxUnderTest) -> None:
    """Check that the trainer's environment (API keys, tokens) reaches no command and no process that is visible."""
    secret = secrets.token_hex(16)
    os.environ["BACKTALK_CONFORMANCE_SECRET"] = secret
    try:
        async with sandbox.another() as fresh:
            read = "{ env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; }"
            found = await fresh.output(f"{read} | grep -oE '[0-9a-f]{{32}}'")  # by name, grep would find itself
            expect(secret not in found, "a variable of the trainer's is inside")
    finally:
        del os.environ["BACKTALK_CONFORMANCE_SECRET"]


async def open_files_of_the_trainer(sandbox: SandboxUnderTest) -> None:
    """Check that a file or socket that the trainer has open, even an inheritable one, is not open inside."""
    with tempfile.TemporaryFile(prefix="backtalk-conformance-") as secret:
        os.set_inheritable(secret.fileno(), True)
        async with sandbox.another() as fresh:
            links = await fresh.output("readlink /proc/[0-9]*/fd/* 2>/dev/null")
    expect("backtalk-conformance" not in links and "socket:" not in links, f"open inside: {links[:300]!r}")


async def processes_of_the_machine(sandbox: SandboxUnderTest) -> None:
    """Check that processes of this machine cannot be seen, by command line or by number."""
    mark = secrets.token_hex(8)
    child = subprocess.Popen(["bash", "-c", "read; :", mark], stdin=subprocess.PIPE)
    try:
        marks = await sandbox.output("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -xE '[0-9a-f]{16}'")
        expect(mark not in marks, "a process of the trainer's is visible")
        seen = await sandbox.output(f"grep -s NSpid /proc/{child.pid}/status; readlink /proc/{os.getpid()}/exe")
        expect(str(child.pid) not in seen.split() and sys.executable not in seen, "visible by its number")
    finally:
        child.communicate(b"\n")


async def ptrace_of_a_neighbour(sandbox: SandboxUnderTest) -> None:
    """Check that a process of another sandbox can be neither seen nor traced."""
    mark = secrets.token_hex(8)
    async with sandbox.another() as other:
        await other.exec(f"bash -c 'sleep 60; :' {mark} & sleep 0.2")
        program = f"""
import ctypes, glob
for path in glob.glob('/proc/[0-9]*/cmdline'):
    try: there = {mark!r}.encode() in open(path, 'rb').read().split(bytes(1))[:-1][-1:]
    except OSError: continue
    if there: print('seen', ctypes.CDLL(None).ptrace(0x4206, int(path.split('/')[2]), 0, 0))
"""
        equal(await sandbox.python(program), "")


async def files_of_a_neighbour(sandbox: SandboxUnderTest) -> None:
    """Check that no sandbox sees what another writes: files, temporary files, shared memory."""
    async with sandbox.another() as other:
        name = f"backtalk-{secrets.token_hex(8)}"
        paths = f"/tmp/{name} /dev/shm/{name} /var/tmp/{name}"
        await sandbox.exec(f"for f in {paths}; do echo mine >$f; chmod 666 $f; done 2>/dev/null")
        try:
            await other.prints(f"cat {paths} 2>/dev/null", "")
        finally:
            await sandbox.exec(f"rm -f {paths}")


async def own_namespaces(sandbox: SandboxUnderTest) -> None:
    """Check that each sandbox has namespaces of its own, none of them this machine's."""
    async with sandbox.another() as other:
        for name in ("pid", "mnt", "net", "ipc", "uts", "user"):
            link = f"/proc/self/ns/{name}"
            ours, theirs = await sandbox.output(f"readlink {link}"), await other.output(f"readlink {link}")
            if not ours:
                raise NotApplicable("/proc/self/ns does not tell")
            expect(ours != theirs, f"two sandboxes share the {name} namespace")
            expect(ours != os.readlink(link) + "\n", f"the {name} namespace is this machine's")


async def root_of_process_one(sandbox: SandboxUnderTest) -> None:
    """Check that the root folder of any visible process, process 1 first, leads to no file of this machine."""
    with folder_of_machine() as folder:
        paths = f"/proc/[0-9]*/root{folder}/secret /proc/[0-9]*/cwd/..{folder}/secret"
        await sandbox.prints(f"cat {paths} 2>/dev/null", "")


async def links_out_of_get(sandbox: SandboxUnderTest) -> None:
    """Check that a link the agent made never lets `get` read a file of this machine."""
    with folder_of_machine() as folder:
        links = {"link": folder, "direct": folder / "secret", "up": f"/proc/1/root{folder}", "cwd": "/proc/1/cwd"}
        await sandbox.exec("; ".join(f"ln -s {target} {link}" for link, target in links.items()))
        for path in ("link/secret", "direct", "up/secret", "cwd/etc/shadow"):
            got = await sandbox.get(f"{HOME}/{path}")
            expect(got is None or b"of the machine" not in got, f"{path} was read")


async def links_out_of_put(sandbox: SandboxUnderTest) -> None:
    """Check that a link the agent made never lets `put` write outside of the sandbox."""
    with folder_of_machine() as folder:
        await sandbox.exec(f"ln -s {folder} link; ln -s {folder}/secret direct")
        for path in ("link/new", "direct"):
            with contextlib.suppress(SandboxError):  # refused: as good
                await sandbox.put(f"{HOME}/{path}", b"written")
        equal(sorted(path.name for path in folder.iterdir()), ["secret"])
        equal((folder / "secret").read_text(), "of the machine")


async def files_of_the_machine(sandbox: SandboxUnderTest) -> None:
    """Check that the trainer's folders, temporary files and home cannot be read or written."""
    with folder_of_machine() as folder:
        await sandbox.prints(f"cat {folder}/secret 2>/dev/null", "")
        await sandbox.fails(f"echo 1 >{folder}/new", "a file of the machine was written")
    here = Path(__file__).parent
    if here.parts[1:2] == ("usr",):
        raise NotApplicable("the package itself lies in /usr, which sandboxes may share read-only")
    await sandbox.prints(f"ls -d {here} 2>/dev/null", "", "the trainer's own code")


# Checks of one kind: the claim, and what is tried.
CASES = {
    _refused: {
        "io_uring": ("A ring of io_uring, which bypasses system call filters, is refused.",
                     "'io_uring_setup', 1, None"),
        "key_rings": ("Kernel key rings, which a trainer's processes would share, are refused.",
                      "'keyctl', 0, -3, 0", "'add_key', b'user', b'x', b'x', 1, -3"),
        "bpf": ("BPF programs are refused.", "'bpf', 5, None, 0"),
        "performance_counters": ("Performance counters and user fault handling, known ways into the kernel, are "
                                 "refused.",
                                 "'perf_event_open', None, 0, -1, -1, 0", "'userfaultfd', 0x7fff"),
        "file_handles": ("Files cannot be opened by handle, which bypasses the rights of every folder above them.",
                         "'open_by_handle_at', -100, None, 0"),
        "power_over_the_machine": ("Modules, other kernels, swap, accounting and a reboot are refused.",
                                   "'init_module', None, 0, None", "'delete_module', b'no-such-module', 0",
                                   "'kexec_load', 0, 0, None, 0x7fff", "'swapon', b'/no/such/file', 0",
                                   "'acct', b'/no/such/file'", "'reboot', 0, 0, 0, None"),  # numbers none of its own
    },
    _fail: {
        "mounts": ("Nothing can be mounted or unmounted, nor mounts made writable.", "mount -t tmpfs t /tmp",
                   "mount -o remount,rw /usr", "mount --bind /tmp /usr", "umount /proc"),
        "user_namespaces": ("No user namespace can be made, in which an agent would have every right over much of the "
                            "kernel.", "unshare -U true", "unshare -r true", "bwrap --ro-bind / / true"),
        "terminal": ("An agent cannot type into a terminal of the trainer's.", "bash -c 'read -t 1 x </dev/tty'",
                     "bash -c 'echo >/dev/tty'"),
    },
    SandboxUnderTest.fails: {
        "core_pattern": ("The program that the kernel runs as root for every crash cannot be set.",
                         "exec 9>>/proc/sys/kernel/core_pattern"),
    },
    SandboxUnderTest.prints: {
        "control_groups": ("No process can be moved out of its control groups, and no limit of theirs raised.",
                           "find /sys/fs/cgroup /cgroup -name cgroup.procs -writable 2>/dev/null | head -n 1", ""),
    },
}  # fmt: skip
HARMFUL_IF_OPEN = (
    "mounts namespaces devices clock host_name power_over_the_machine priorities programs_of_the_machine"
).split()
