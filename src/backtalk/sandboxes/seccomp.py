"""A filter for system calls no task needs, which reach far into the kernel or into what belongs to the user."""

from __future__ import annotations

import platform
import struct

# Per machine: the audit architecture number, then the calls' numbers (Linux, asm/unistd).
_CALLS = {
    # keyctl, add_key, request_key: the trainer's key ring is inherited. bpf, perf, userfaultfd, io_uring: large
    # attack surfaces. kexec, modules, swap, reboot, accounting, quota, syslog, handles: the machine's, not ours.
    "x86_64": (
        0xC000003E,
        (250, 248, 249, 321, 298, 323, 425, 426, 427, 246, 320, 175, 313, 176, 167, 168, 169, 163, 179, 103, 303, 304),
    ),
    "aarch64": (
        0xC00000B7,
        (219, 217, 218, 280, 241, 282, 425, 426, 427, 104, 294, 105, 273, 106, 224, 225, 142, 89, 60, 116, 264, 265),
    ),
}
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # classic BPF instructions
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM
_X32_BIT = 0x40000000


def seccomp_program() -> bytes | None:
    """The filter as bwrap wants it (an array of struct sock_filter), or None on a machine it is not written for."""
    if platform.machine() not in _CALLS:
        return None
    architecture, calls = _CALLS[platform.machine()]
    refuse_at = 4 + len(calls) + 1  # index of the last instruction
    program = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 0, refuse_at - 2, architecture)]
    program += [(_LOAD, 0, 0, 0), (_IF_AT_LEAST, refuse_at - 4, 0, _X32_BIT)]
    for index, call in enumerate(calls, start=4):
        program.append((_IF_EQUAL, refuse_at - index - 1, 0, call))
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
