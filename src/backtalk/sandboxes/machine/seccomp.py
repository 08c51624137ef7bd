"""Build the seccomp filter of sandboxes: it refuses system calls that no task needs and that endanger the host."""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers of one processor: its audit architecture, the refused calls, and those that make sockets."""

    architecture: int
    refused: tuple[int, ...]
    socket: int
    socketpair: int


# Linux, asm/unistd. keyctl, add_key, request_key: the trainer's key ring is inherited. bpf, perf, userfaultfd,
# io_uring: large attack surfaces. kexec, modules, swap, reboot, accounting, quota, syslog, handles: the machine's.
_NUMBERS = {
    "x86_64": _Numbers(
        0xC000003E,
        (250, 248, 249, 321, 298, 323, 425, 426, 427, 246, 320, 175, 313, 176, 167, 168, 169, 163, 179, 103, 303, 304),
        socket=41,
        socketpair=53,
    ),
    "aarch64": _Numbers(
        0xC00000B7,
        (219, 217, 218, 280, 241, 282, 425, 426, 427, 104, 294, 105, 273, 106, 224, 225, 142, 89, 60, 116, 264, 265),
        socket=198,
        socketpair=199,
    ),
}
# Classic BPF: load a word, and; jump where equal, where at least; return.
_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM
_NUMBER_AT, _ARCHITECTURE_AT, _SECOND_ARGUMENT_AT = 0, 4, 24  # in struct seccomp_data
_X32_BIT = 0x40000000
_STREAM, _SEQPACKET = 1, 5


def seccomp_program(*, sockets: bool = True) -> bytes | None:
    """Return the filter as an array of struct sock_filter, or None for a processor whose numbers are not listed here.

    ``sockets`` False refuses sockets too, for backends without a network namespace: sockets would reach the network and
    services of this machine that listen on a file. Connected pairs of stream sockets stay allowed.
    """
    if platform.machine() not in _NUMBERS:
        return None
    numbers = _NUMBERS[platform.machine()]
    refused = [*numbers.refused, *([] if sockets else [numbers.socket])]
    # A jump counts from the next instruction; "refuse" is the last one and "allow" the one before it.
    tail = [] if sockets else _pairs_of_streams(numbers.socketpair)
    end = 4 + len(refused) + len(tail)
    program = [(_LOAD, 0, 0, _ARCHITECTURE_AT), (_IF_EQUAL, 0, end - 1, numbers.architecture)]
    program += [(_LOAD, 0, 0, _NUMBER_AT), (_IF_AT_LEAST, end - 3, 0, _X32_BIT)]
    for index, call in enumerate(refused, start=4):
        program.append((_IF_EQUAL, end - index, 0, call))
    program += [*tail, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _pairs_of_streams(socketpair: int) -> list[tuple[int, int, int, int]]:
    """Return the rules for pairs: no datagrams, since such a socket can write to any socket file."""
    return [
        (_IF_EQUAL, 0, 4, socketpair),  # else allow
        (_LOAD, 0, 0, _SECOND_ARGUMENT_AT),
        (_AND, 0, 0, 0xF),  # without SOCK_NONBLOCK and SOCK_CLOEXEC
        (_IF_EQUAL, 1, 0, _STREAM),
        (_IF_EQUAL, 0, 1, _SEQPACKET),
    ]
