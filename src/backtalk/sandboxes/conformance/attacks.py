"""What an agent might try against the kernel, the machine, and other rollouts on it.

Each attempt is one whose success does no harm: a file is opened and not written, a setting set to what it is, a call
made with arguments that it would refuse next.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from backtalk.sandboxes.conformance.base import Box, Category, NotApplicable, expect, made, same

# Numbers of system calls (Linux, asm/unistd) on x86_64 and aarch64.
_CALLS = {
    "keyctl": (250, 219), "add_key": (248, 217), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "kexec_load": (246, 104), "init_module": (175, 105),
    "delete_module": (176, 106), "swapon": (167, 224), "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116),
    "open_by_handle_at": (304, 265), "unshare": (272, 97), "setns": (308, 268), "pivot_root": (155, 41),
}  # fmt: skip
_REFUSED = (1, 13, 38)  # EPERM, EACCES, ENOSYS: any other errno is from beyond the check of rights


async def _refused(box: Box, *calls: str) -> None:
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
    said = await box.python(program)
    if "unknown machine" in said:
        raise NotApplicable("the numbers of the system calls are not known for this processor")
    same(said, "", "not refused")


async def _fails(box: Box, *commands: str) -> None:
    """Fail unless every command does."""
    for command in commands:
        expect(await box.code(f"timeout 10 {command}") != 0, f"`{command}` succeeded")


async def core_pattern(box: Box) -> None:
    """The program that the kernel runs as root for every crash cannot be set."""
    expect(await box.code("exec 9>>/proc/sys/kernel/core_pattern") != 0, "core_pattern opened for writing")


async def kernel_settings(box: Box) -> None:
    """No kernel setting and no request to the kernel can be written: /proc/sys, /sys, sysrq."""
    opened = "[[ -f $f ]] && { : >>$f; } 2>/dev/null && echo $f"  # access(2) alone may be told anything
    writable = "find /proc/sys /sys -writable 2>/dev/null"
    same(await box.out(f"{writable} | while read -r f; do {opened}; done | head -n 3"), "")
    special = "/proc/sysrq-trigger /proc/sys/kernel/modprobe /proc/sys/kernel/hostname /proc/sys/vm/drop_caches"
    same(await box.out(f"for f in {special} /proc/irq/*/smp_affinity /proc/acpi/*; do {opened}; done"), "")


async def control_groups(box: Box) -> None:
    """No process can be moved out of its control groups, and no limit of theirs raised."""
    find = "find /sys/fs/cgroup /cgroup -name cgroup.procs -writable 2>/dev/null | head -n 1"
    same(await box.out(find), "")


async def mounts(box: Box) -> None:
    """Nothing can be mounted or unmounted, nor mounts made writable."""
    await _fails(box, "mount -t tmpfs t /tmp", "mount -o remount,rw /usr", "mount --bind /tmp /usr", "umount /proc")


async def user_namespaces(box: Box) -> None:
    """No user namespace can be made, in which an agent would have every right over large parts of the kernel."""
    await _fails(box, "unshare -U true", "unshare -r true", "bwrap --ro-bind / / true")


async def namespaces(box: Box) -> None:
    """No other namespace can be made or entered, and the root folder cannot be changed."""
    kinds = (0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000, 0x02000000)  # mount uts ipc pid net cgroup
    await _refused(box, *(f"'unshare', {kind}" for kind in kinds), "'pivot_root', b'/tmp', b'/tmp'")
    await _fails(box, "chroot / true", "nsenter -t 1 -m true", "nsenter -t 1 -U true", "nsenter -t 1 -n true")


async def capabilities(box: Box) -> None:
    """No process inside has a capability, and none can get one."""
    said = await box.out("grep -E '^Cap(Prm|Eff|Bnd|Inh|Amb)' /proc/self/status | cut -f2 | sort -u")
    same(said, "0" * 16 + "\n", "capability sets")


async def setuid_programs(box: Box) -> None:
    """Programs that would run as root by their mode do not: no new privileges, whatever a file's owner."""
    same(await box.out("grep NoNewPrivs /proc/self/status"), "NoNewPrivs:\t1\n")
    await _fails(box, "su -c true </dev/null", "sudo -n true", "mount -l -t none /x")


async def not_root_outside(box: Box) -> None:
    """Seen from this machine, the agent's processes belong to an ordinary user."""
    mark = secrets.token_hex(8)
    await box.run(f"bash -c 'sleep 60; :' {mark} & sleep 0.2")
    owners = {path.stat().st_uid for path in _with_argument(mark)}
    if not owners:
        raise NotApplicable("its processes are not to be seen on this machine")
    expect(0 not in owners, "its processes run as root of this machine")


async def devices(box: Box) -> None:
    """No device can be made, and those that are there are harmless."""
    await _fails(box, "mknod disk b 8 0", "mknod memory c 1 1", "mknod /dev/kmsg c 1 11")
    harmless = "null zero full random urandom tty console ptmx pts shm mqueue fd stdin stdout stderr core".split()
    there = set((await box.out("ls /dev")).split())
    same(sorted(there - set(harmless)), [], "devices")


async def memory_of_the_machine(box: Box) -> None:
    """The machine's memory cannot be read as a file."""
    for path in ("/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore", "/proc/kpagecount", "/proc/vmcore"):
        expect(await box.code(f"exec 9<{path}") != 0, f"{path} can be opened")


async def kernel_log(box: Box) -> None:
    """The kernel's log, with what it tells of the machine and of addresses, cannot be read."""
    await _fails(box, "dmesg", "head -c 1 /dev/kmsg", "head -c 1 /proc/kmsg")
    await _refused(box, "'syslog', 3, None, 0")


async def clock(box: Box) -> None:
    """The machine's clock cannot be set."""
    await _fails(box, "date -s @$(date +%s)")
    program = (
        "import time\ntry: time.clock_settime(time.CLOCK_REALTIME, time.time()); print('set')\nexcept OSError: pass"
    )
    same(await box.python(program), "")


async def host_name(box: Box) -> None:
    """The host name cannot be set, and tells nothing of this machine."""
    await _fails(box, 'hostname "$(hostname)"')
    expect((await box.out("uname -n")).strip() != os.uname().nodename, "it has this machine's name")


async def io_uring(box: Box) -> None:
    """io_uring, which passes by system call filters, is refused."""
    await _refused(box, "'io_uring_setup', 1, None")


async def key_rings(box: Box) -> None:
    """Kernel key rings, which a trainer's processes would share, are refused."""
    await _refused(box, "'keyctl', 0, -3, 0", "'add_key', b'user', b'x', b'x', 1, -3")


async def bpf(box: Box) -> None:
    """bpf programs are refused."""
    await _refused(box, "'bpf', 5, None, 0")


async def performance_counters(box: Box) -> None:
    """Performance counters and user fault handling, known ways into the kernel, are refused."""
    await _refused(box, "'perf_event_open', None, 0, -1, -1, 0", "'userfaultfd', 0x7fff")


async def power_over_the_machine(box: Box) -> None:
    """Modules, other kernels, swap, accounting and a reboot are refused."""
    await _refused(
        box,
        "'init_module', None, 0, None",
        "'delete_module', b'no-such-module', 0",
        "'kexec_load', 0, 0, None, 0x7fff",
        "'swapon', b'/no/such/file', 0",
        "'acct', b'/no/such/file'",
        "'reboot', 0, 0, 0, None",  # with numbers that are none of its own
    )


async def file_handles(box: Box) -> None:
    """Files cannot be opened by handle, which passes by every folder above them."""
    await _refused(box, "'open_by_handle_at', -100, None, 0")


async def foreign_system_calls(box: Box) -> None:
    """Calls by the numbers of another architecture, which a filter might not know, are refused."""
    program = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
if platform.machine() != 'x86_64': print('unknown machine')
elif libc.syscall(0x40000000 + 39) != -1: print('x32')
"""
    said = await box.python(program)
    if "Bad system call" in said:
        return  # it was killed for it
    if "unknown machine" in said:
        raise NotApplicable("x86_64 alone has such calls")
    same(said, "")


async def priorities(box: Box) -> None:
    """No process can put itself before others of this machine."""
    program = """
import os
try: os.setpriority(os.PRIO_PROCESS, 0, -1); print('nice')
except OSError: pass
try: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); print('fifo')
except OSError: pass
"""
    same(await box.python(program), "")


async def raised_limits(box: Box) -> None:
    """A limit that holds cannot be raised again: processes, size of files, open files."""
    raised = (
        "for f in u f n; do [[ $(ulimit -H$f) != unlimited ]] && ulimit -H$f unlimited && echo $f; done 2>/dev/null"
    )
    same(await box.out(raised), "")
    expect((await box.out("ulimit -Hu")).strip() != "unlimited", "processes are not limited at all")


async def programs_of_the_machine(box: Box) -> None:
    """The programs and libraries that this machine runs cannot be written."""
    for folder in ("/usr/bin", "/bin", "/sbin", "/lib", "/usr/lib", "/usr/local/bin"):
        await _fails(box, f"touch {folder}/backtalk-conformance")
    await _fails(box, "truncate -s +0 /usr/bin/env", "truncate -s +0 /bin/bash")


async def secrets_in_the_environment(box: Box) -> None:
    """The trainer's environment (API keys, tokens) reaches no command and is in no process to be seen inside."""
    secret = secrets.token_hex(16)
    os.environ["BACKTALK_CONFORMANCE_SECRET"] = secret
    try:
        async with box.another() as fresh:
            look = "{ env; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; }"
            said = await fresh.out(f"{look} | grep -oE '[0-9a-f]{{32}}'")  # not by name, or grep would find itself
            expect(secret not in said, "a variable of the trainer's is inside")
    finally:
        del os.environ["BACKTALK_CONFORMANCE_SECRET"]


async def open_files_of_the_trainer(box: Box) -> None:
    """A file or socket that the trainer has open, even one to be inherited, is not open inside."""
    with tempfile.TemporaryFile(prefix="backtalk-conformance-") as secret:
        os.set_inheritable(secret.fileno(), True)
        async with box.another() as fresh:
            there = await fresh.out("readlink /proc/[0-9]*/fd/* 2>/dev/null")
    expect("backtalk-conformance" not in there and "socket:" not in there, f"open inside: {there[:300]!r}")


async def processes_of_the_machine(box: Box) -> None:
    """Processes of this machine are not seen and cannot be signalled."""
    mark = secrets.token_hex(8)
    child = subprocess.Popen(["bash", "-c", "read; :", mark], stdin=subprocess.PIPE)
    try:
        said = await box.out("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -xE '[0-9a-f]{16}'")
        expect(mark not in said, "a process of the trainer's is seen")
        seen = await box.out(f"grep -s NSpid /proc/{child.pid}/status; readlink /proc/{os.getpid()}/exe")
        expect(str(child.pid) not in seen.split() and sys.executable not in seen, "seen by its number")
    finally:
        child.communicate(b"\n")


async def ptrace_of_a_neighbour(box: Box) -> None:
    """A process of another sandbox is neither seen nor traced."""
    mark = secrets.token_hex(8)
    async with box.another() as other:
        await other.run(f"bash -c 'sleep 60; :' {mark} & sleep 0.2")
        program = f"""
import ctypes, glob
for path in glob.glob('/proc/[0-9]*/cmdline'):
    try: there = {mark!r}.encode() in open(path, 'rb').read().split(bytes(1))[:-1][-1:]
    except OSError: continue
    if there: print('seen', ctypes.CDLL(None).ptrace(0x4206, int(path.split('/')[2]), 0, 0))
"""
        same(await box.python(program), "")


async def files_of_a_neighbour(box: Box) -> None:
    """What one sandbox writes, no other sees: files, temporary files, shared memory."""
    async with box.another() as other:
        name = f"backtalk-{secrets.token_hex(8)}"
        places = f"/tmp/{name} /dev/shm/{name} /var/tmp/{name}"
        await box.run(f"for f in {places}; do echo mine >$f; chmod 666 $f; done 2>/dev/null")
        try:
            same(await other.out(f"cat {places} 2>/dev/null"), "")
        finally:
            await box.run(f"rm -f {places}")


async def own_namespaces(box: Box) -> None:
    """Each sandbox has namespaces of its own, none of them this machine's."""
    async with box.another() as other:
        for name in ("pid", "mnt", "net", "ipc", "uts", "user"):
            mine, theirs = [await each.out(f"readlink /proc/self/ns/{name}") for each in (box, other)]
            if not mine:
                raise NotApplicable("/proc/self/ns does not tell")
            expect(mine != theirs, f"two sandboxes share the {name} namespace")
            expect(mine != os.readlink(f"/proc/self/ns/{name}") + "\n", f"the {name} namespace is this machine's")


async def root_of_process_one(box: Box) -> None:
    """The root folder of any process to be seen, process 1 first, leads to no file of this machine."""
    with tempfile.TemporaryDirectory(prefix="backtalk-conformance-") as name:
        Path(name).chmod(0o755)
        Path(name, "secret").write_text("of the machine")
        same(await box.out(f"cat /proc/[0-9]*/root{name}/secret /proc/[0-9]*/cwd/..{name}/secret 2>/dev/null"), "")


async def terminal(box: Box) -> None:
    """There is no terminal of the trainer's into which an agent could type."""
    await _fails(box, "bash -c 'read -t 1 x </dev/tty'", "bash -c 'echo >/dev/tty'")


def _with_argument(argument: str) -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent)
        except OSError:
            continue
    return found


CHECKS = made(
    Category.ATTACK,
    core_pattern, kernel_settings, control_groups, user_namespaces, capabilities, setuid_programs, not_root_outside,
    memory_of_the_machine, kernel_log, io_uring, key_rings, bpf, performance_counters, file_handles,
    foreign_system_calls, raised_limits, secrets_in_the_environment, open_files_of_the_trainer,
    processes_of_the_machine, ptrace_of_a_neighbour, files_of_a_neighbour, own_namespaces, root_of_process_one,
    terminal,
) + made(
    Category.ATTACK,
    mounts, namespaces, devices, clock, host_name, power_over_the_machine, priorities, programs_of_the_machine,
    harmful_if_open=True,
)  # fmt: skip
