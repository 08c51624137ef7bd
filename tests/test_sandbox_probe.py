"""Where control groups are looked for, and what is advised where there is no safe sandbox."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from backtalk.errors import SandboxUnavailable
from backtalk.sandboxes import SandboxLimits, local_sandbox
from backtalk.sandboxes.cgroup import CgroupParents, _upwards
from backtalk.sandboxes.layers import inner_argv, outer_argv
from backtalk.sandboxes.probe import advice, probe
from backtalk.sandboxes.seccomp import seccomp_program


def test_groups_are_made_below_our_own_or_above_it() -> None:
    mount = Path("/sys/fs/cgroup")
    assert _upwards(mount, "/", "/user.slice/a.scope") == [mount / "user.slice/a.scope", mount / "user.slice", mount]
    assert _upwards(mount, "/docker/1", "/docker/1") == [mount]  # a container sees its own group as the whole
    assert _upwards(mount, "/docker/1", "/elsewhere") == [mount]
    assert _upwards(mount, "/", "/../../other")[-1] == mount


def test_advice_names_what_is_missing() -> None:
    machine = dataclasses.replace(probe(use_cgroups=False), blocked_by=None, bash="/bin/bash", uid=1000)
    assert "apt install bubblewrap" in advice(dataclasses.replace(machine, bwrap=None))
    machine = dataclasses.replace(machine, bwrap="/usr/bin/bwrap")
    assert "bash" in advice(dataclasses.replace(machine, bash=None))
    assert "util-linux" in advice(dataclasses.replace(machine, uid=0, setpriv=None))
    assert "seccomp=unconfined" in advice(machine)
    assert advice(dataclasses.replace(machine, blocked_by="run sysctl")) == "run sysctl"


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        local_sandbox()


def test_a_bubblewrap_that_fails_is_told_with_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo bubblewrap 0.8.0 || { echo no namespaces >&2; exit 1; }\n'
    )
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SandboxUnavailable, match=r"does not work here .*(no namespaces|Permission denied)"):
        local_sandbox()
    broken.write_text("#!/bin/sh\necho bubblewrap 0.4.1\n")
    with pytest.raises(SandboxUnavailable, match=r"0\.4"):
        local_sandbox()


def test_an_older_bubblewrap_gets_only_options_it_knows() -> None:
    machine = dataclasses.replace(
        probe(use_cgroups=False), bwrap="/usr/bin/bwrap", bwrap_version=(0, 6), cgroups=CgroupParents(0)
    )
    assert "--size" not in outer_argv(machine, SandboxLimits(), None, info_fd=9, filter_fd=None)
    assert "--disable-userns" not in inner_argv(machine, info_fd=9)
    elsewhere = dataclasses.replace(machine, bwrap="/opt/bwrap", bwrap_version=(0, 8))
    assert "/run/bwrap" in outer_argv(elsewhere, SandboxLimits(), None, info_fd=9, filter_fd=None)
    assert inner_argv(elsewhere, info_fd=9)[0] == "/run/bwrap"


def test_the_filter_is_whole_instructions() -> None:
    program = seccomp_program()
    assert program is None or len(program) % 8 == 0
