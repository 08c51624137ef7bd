"""Tests of where control groups are made, of the filter, and of advice where there is no safe sandbox."""

from __future__ import annotations

import dataclasses
import platform
import struct
from pathlib import Path

import pytest

from backtalk.errors import SandboxUnavailable
from backtalk.sandboxes import SandboxLimits, local_sandbox
from backtalk.sandboxes.bubblewrap.layers import inner_argv, outer_argv
from backtalk.sandboxes.machine.cgroup import CgroupParents, _upwards
from backtalk.sandboxes.machine.probe import advice, probe, run_trial
from backtalk.sandboxes.machine.seccomp import seccomp_program


def test_groups_are_made_below_our_own_or_above_it() -> None:
    mount = Path("/sys/fs/cgroup")
    assert _upwards(mount, "/", "/user.slice/a.scope") == [mount / "user.slice/a.scope", mount / "user.slice", mount]
    assert _upwards(mount, "/docker/1", "/docker/1") == [mount]  # a container sees its own group as the whole
    assert _upwards(mount, "/docker/1", "/elsewhere") == [mount]
    assert _upwards(mount, "/", "/../../other")[-1] == mount


def test_advice_names_what_is_missing() -> None:
    machine = dataclasses.replace(probe(use_cgroups=False), blocked_by=None, bash="/bin/bash", uid=1000)
    assert "apt install bubblewrap" in advice(dataclasses.replace(machine, bwrap=""))
    machine = dataclasses.replace(machine, bwrap="/usr/bin/bwrap")
    assert "bash" in advice(dataclasses.replace(machine, bash=None))
    assert "util-linux" in advice(dataclasses.replace(machine, uid=0, setpriv=None))
    assert "seccomp=unconfined" in advice(machine)
    assert advice(dataclasses.replace(machine, blocked_by="run sysctl")) == "run sysctl"


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        local_sandbox("bubblewrap")


def test_a_bubblewrap_that_fails_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo bubblewrap 0.8.0 || { echo no namespaces >&2; exit 1; }\n'
    )
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SandboxUnavailable, match=r"does not work here .*(no namespaces|Permission denied)"):
        local_sandbox("bubblewrap")
    broken.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    with pytest.raises(SandboxUnavailable, match=r"0\.4"):
        local_sandbox("bubblewrap")


def test_an_older_bubblewrap_gets_only_options_it_knows() -> None:
    machine = dataclasses.replace(
        probe(use_cgroups=False), bwrap="/usr/bin/bwrap", bwrap_version=(0, 6), cgroups=CgroupParents(0)
    )
    assert "--size" not in outer_argv(machine, SandboxLimits(), None, info_fd=9, filter_fd=None)
    assert "--disable-userns" not in inner_argv(machine, info_fd=9)
    elsewhere = dataclasses.replace(machine, bwrap="/opt/bwrap", bwrap_version=(0, 8))
    assert "/.bwrap" in outer_argv(elsewhere, SandboxLimits(), None, info_fd=9, filter_fd=None)
    assert inner_argv(elsewhere, info_fd=9)[0] == "/.bwrap"


def verdict(program: bytes, number: int, *, argument: int = 0, architecture: int = 0xC000003E) -> int:
    """Return the kernel's answer: run the filter's instructions as linux/bpf_common.h defines them."""
    data = struct.pack("=IIQQQ", number, architecture, 0, 0, argument)  # the call, and its first two arguments
    rules = list(struct.iter_unpack("=HBBI", program))
    at, value = 0, 0
    while True:
        code, if_true, if_false, constant = rules[at]
        at += 1
        match code:
            case 0x20:
                value = int.from_bytes(data[constant : constant + 4], "little")
            case 0x54:
                value &= constant
            case 0x15:
                at += if_true if value == constant else if_false
            case 0x35:
                at += if_true if value >= constant else if_false
            case 0x06:
                return constant


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
def test_the_filter_refuses_what_it_names() -> None:
    allow, refuse = 0x7FFF0000, 0x00050001
    for sockets in (True, False):
        program = seccomp_program(sockets=sockets)
        assert program is not None and len(program) % 8 == 0
        assert [verdict(program, call) for call in (0, 1, 59)] == [allow] * 3  # read, write, execve
        assert [verdict(program, call) for call in (321, 425, 250, 304)] == [refuse] * 4  # bpf, io_uring, keyctl
        assert verdict(program, 0x40000001) == refuse and verdict(program, 1, architecture=0x40000003) == refuse
        assert verdict(program, 41) == (allow if sockets else refuse)
        # socketpair: streams and packets in order, whatever flags; no datagrams (2), no raw (3)
        kinds = [verdict(program, 53, argument=kind) for kind in (1, 5, 1 | 0o2000000, 2, 3, 2 | 0o4000)]
        assert kinds == [allow] * 3 + [allow if sockets else refuse] * 3


def test_a_trial_that_breaks_in_an_unforeseen_way_passes_nothing() -> None:
    async def breaks() -> None:
        raise NameError("a mistake of ours")

    with pytest.raises(NameError):
        run_trial(breaks)
