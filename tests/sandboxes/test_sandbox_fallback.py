"""Sandboxes on a machine that blocks namespaces: `auto` takes sandlock and says so, or refuses with what to type.

Namespaces are blocked as Docker's default profile does it, by a filter for system calls in a separate process, so that
the rest of the machine is not affected.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from backtalk.errors import ConfigError, SandboxUnavailable
from backtalk.sandboxes import SandboxFile, SandboxLimits, local_sandbox
from backtalk.sandboxes.conformance import CHECKS, Category
from backtalk.sandboxes.sandlock import keeper
from backtalk.sandboxes.sandlock.backend import SandlockBackend, SandlockSandbox
from sandbox_help import with_argument

SOURCE = Path(__file__).parents[2] / "src"
# What sandlock does not do, check by check; docs/security.md says so too.
CANNOT = {
    "local_server", "network_of_its_own", "non_blocking_output", "writable_places", "disk", "too_large_to_put",
    "own_namespaces", "devices", "trusted_files",
}  # fmt: skip
CANNOT_AS = {"root": CANNOT, "ordinary": CANNOT | {"capabilities"}}
# Everything as an ordinary user; as root what a uid of its own has to do with.
CHECKS_AS = {
    "root": [check.name for check in CHECKS if check.category in (Category.ATTACK, Category.LIMIT)],
    "ordinary": [check.name for check in CHECKS],
}
# Landlock and the filters it stands on: refuses clone and unshare with a namespace's flag, clone3, mount and setns.
BLOCK = r"""
import asyncio, ctypes, json, os, platform, struct, sys
def block(landlock):
    numbers = {'x86_64': (272, 56, 435, 165, 308, 444), 'aarch64': (97, 220, 435, 40, 268, 444)}
    unshare, clone, clone3, mount, setns, ruleset = numbers[platform.machine()]
    load, jump, bits, give = 0x20, 0x15, 0x45, 0x06
    refuse, missing, allow = 0x50001, 0x50026, 0x7fff0000
    program = [(load, 0, 0, 0)]
    answers = {clone3: missing, mount: refuse, setns: refuse} | ({} if landlock else {ruleset: missing})
    for call, answer in answers.items():
        program += [(jump, 0, 1, call), (give, 0, 0, answer)]
    program += [(jump, 1, 0, unshare), (jump, 0, 3, clone), (load, 0, 0, 16), (bits, 0, 1, 0x7e020000)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    rules = b''.join(struct.pack('=HBBI', *each) for each in program)
    buffer = ctypes.create_string_buffer(rules, len(rules))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, struct.pack('@HP', len(program), ctypes.addressof(buffer)), 0, 0) == 0
    assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == 1
"""
REPORT = (
    BLOCK
    + r"""
block(landlock='landlock' in sys.argv)
from backtalk.errors import SandboxUnavailable
from backtalk.sandboxes import local_sandbox
try:
    report = local_sandbox().report
    print(json.dumps({'name': report.name, 'warnings': report.warnings, 'cannot': sorted(report.cannot)}))
except SandboxUnavailable as error:
    print(json.dumps({'refused': str(error)}))
"""
)
SUITE = (
    BLOCK
    + r"""
block(landlock=True)
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.conformance import conformance
backend = local_sandbox()
assert backend.report.name == 'sandlock', backend.report
results = asyncio.run(conformance(backend, only=sys.argv[1:]))
print(json.dumps([[r.check.name, r.outcome, r.reason] for r in results]))
"""
)


def sandlock_or_skip() -> SandlockBackend:
    try:
        return SandlockBackend()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def command_of(user: str) -> list[str]:
    """Return the command of a Python that this user can run and that can read both packages; else skip the test."""
    if user == "ordinary" and os.getuid() != 0:
        return [sys.executable]
    if user == "root":
        return [sys.executable] if os.getuid() == 0 else pytest.skip("only root can run it as root")
    setpriv = shutil.which("setpriv") or pytest.skip("setpriv is not installed")
    check = "import backtalk.errors, sandlock, subprocess, sys; subprocess.run([sys.executable, '-V'], check=True)"
    for python in (sys.executable, "/usr/bin/python3"):
        command = [setpriv, "--reuid", "1000", "--regid", "1000", "--clear-groups", python]
        done = subprocess.run([*command, "-c", check], capture_output=True, env=environment(), cwd="/", check=False)
        if done.returncode == 0:
            return command
    pytest.skip("no Python 3.11 with the packages that uid 1000 can read")


def environment() -> dict[str, str]:
    found = find_spec("sandlock")
    packages = "" if found is None or found.origin is None else str(Path(found.origin).parent.parent)
    path = ":".join((str(SOURCE), packages))
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def run_program(user: str, program: str, *arguments: str) -> dict[str, object]:
    command = [*command_of(user), "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cache
def suite(user: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [*command_of(user), "-c", SUITE, *CHECKS_AS[user]]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment(), cwd="/"
    )


@pytest.fixture(scope="module", autouse=True)
def beside(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run both suites, if their tests are to run, beside the rest of this file, because they mostly wait."""
    selected = any(item.originalname == "test_conformance" for item in request.session.items)
    started = []
    for user in ("root", "ordinary") if selected else ():
        try:
            sandlock_or_skip()
            started.append(suite(user))
        except pytest.skip.Exception:  # its test says why
            continue
    yield
    for process in started:
        process.kill()
        process.communicate()


# The choice


@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_auto_takes_sandlock_and_says_so_first(user: str) -> None:
    sandlock_or_skip()
    report = run_program(user, REPORT, "landlock")
    assert report["name"] == "sandlock", report
    warnings = report["warnings"]
    assert isinstance(warnings, list)
    assert warnings[0].startswith("sandlock is in force because bubblewrap, tried first, is not available: ")
    assert "isolates less than bubblewrap" in warnings[1]
    assert set(report["cannot"]) == CANNOT_AS[user]  # type: ignore[call-overload]


@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_without_landlock_too_it_refuses_and_says_what_to_type(user: str) -> None:
    sandlock_or_skip()
    refused = run_program(user, REPORT)["refused"]
    assert isinstance(refused, str)
    lines = refused.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["bubblewrap", "sandlock"]
    for advice in ("user namespaces", "pip install 'backtalk[harbor]'", "HarborBackend('docker')", "'unsafe'"):
        assert advice in refused


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("backtalk.sandboxes.sandlock.backend.find_spec", lambda name: None)
    with pytest.raises(SandboxUnavailable, match=r"(?s)apt install bubblewrap.*pip install 'backtalk\[sandlock\]'"):
        local_sandbox()


def test_the_first_that_works_is_taken() -> None:
    try:
        assert local_sandbox("bubblewrap").report == local_sandbox().report
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("choice", ["sandlock", "unsafe"])
def test_a_root_for_a_backend_that_takes_none_is_refused(choice: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use bubblewrap"):
        local_sandbox(choice, root=tmp_path)  # type: ignore[arg-type]


def test_the_guards_program_is_there() -> None:
    """Without it every trial start fails, which the other tests take for a machine where sandlock cannot run."""
    assert keeper.GUARD.is_file()


# What sandlock by itself lets through


async def out(sandbox: SandlockSandbox, command: str) -> str:
    return (await sandbox.exec(command, timeout_s=20)).output


async def test_no_socket_file_of_the_machine_is_reached(tmp_path: Path) -> None:
    """sandlock 0.9.0 connects a command under a root of its own to a socket outside of it."""
    tmp_path.chmod(0o755)
    program = f"""
import socket
def attempt(what):
    try: what(); print("reached")
    except OSError as error: print(error.errno)
attempt(lambda: socket.socket(socket.AF_UNIX).connect({str(tmp_path / "s")!r}))
attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", {str(tmp_path / "s")!r}))
attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)[0].sendto(b"x", {str(tmp_path / "s")!r}))
attempt(lambda: socket.socket(socket.AF_INET))
a, b = socket.socketpair(); a.send(b"pair"); print(b.recv(9))
"""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        os.chmod(tmp_path / "s", 0o777)
        server.listen()
        async with sandlock_or_skip().open(SandboxLimits()) as sandbox:
            await sandbox.put({"/home/agent/p.py": SandboxFile(program.encode())})
            got = await out(sandbox, "python3 p.py")
    if "not found" in got:
        pytest.skip("no python3 inside to try it with")
    assert got == "1\n1\n1\n1\nb'pair'\n"


async def test_what_is_not_answered_by_sandlock_ends_at_landlock(tmp_path: Path) -> None:
    """Calls for paths that it does not know (creat, mknod) go to this machine's files, and are refused there."""
    tmp_path.chmod(0o777)
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for path in ({str(tmp_path / "x")!r}, "/proc/self/oom_score_adj", "/proc/{os.getpid()}/oom_score_adj", "/dev/kmsg"):
    print(libc.creat(path.encode(), 0o644))
print(libc.mknod({str(tmp_path / "y")!r}.encode(), 0o10644, 0))
"""
    async with sandlock_or_skip().open(SandboxLimits()) as sandbox:
        await sandbox.put({"/home/agent/p.py": SandboxFile(program.encode())})
        got = await out(sandbox, "python3 p.py")
    if "not found" in got:
        pytest.skip("no python3 inside to try it with")
    assert got == "-1\n" * 5 and list(tmp_path.iterdir()) == []


async def test_files_of_the_trainers_side_follow_no_link_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the machine")
    async with sandlock_or_skip().open(SandboxLimits()) as sandbox:
        await out(sandbox, f"mkdir d; ln -s d inner; ln -s {tmp_path} out; ln -s /etc/shadow s; chmod 000 d")
        await sandbox.put({"/home/agent/inner/f": SandboxFile(b"x", mode=0o755, mtime=1_700_000_000)})
        assert await out(sandbox, "cat d/f; stat -c '%a %Y' d/f") == "x755 1700000000\n"
        assert await sandbox.get("/home/agent/inner/f") == b"x"
        assert await sandbox.get("/home/agent/out/secret") is None and await sandbox.get("/home/agent/s") is None
        await sandbox.put({"/home/agent/s": SandboxFile(b"mine")})
        assert await out(sandbox, "cat s") == "mine"
    assert (tmp_path / "secret").read_text() == "of the machine"


async def test_no_process_of_a_session_survives_the_trainers_end() -> None:
    """A guard whose trainer is gone ends all below it: those too that left their group, session and parents."""
    program = (
        "import asyncio, os\n"
        "from backtalk.sandboxes import SandboxLimits, local_sandbox\n"
        "async def main():\n"
        "  async with local_sandbox('sandlock').open(SandboxLimits()) as sandbox:\n"
        "    await sandbox.exec('(setsid env -i sleep 6101 &) ; sleep 6101 &', timeout_s=20)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    sandlock_or_skip()
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    until_s = time.monotonic() + 20
    while with_argument("6101") and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not with_argument("6101")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives each sandbox a uid by which to find what is left")
async def test_a_guard_that_somebody_ends_leaves_nothing() -> None:
    async with sandlock_or_skip().open(SandboxLimits()) as sandbox:
        await out(sandbox, "(setsid env -i sleep 6111 &); echo kept >f")
        guard = sandbox._guarded._guard
        assert guard is not None
        guard.kill()
        async with asyncio.timeout(
            120
        ):  # at first the old shell may answer, none of whose calls for a path work any more
            while (await sandbox.exec("/bin/true", timeout_s=20)).exit_code != 137:
                await asyncio.sleep(0.05)
        until_s = time.monotonic() + 20
        while with_argument("6111") and time.monotonic() < until_s:
            await asyncio.sleep(0.05)
        assert not with_argument("6111")
        assert await out(sandbox, "cat f") == "kept\n"


# The suite: last, for it runs beside all the rest


@cache
def results(user: str) -> dict[str, tuple[str, str]]:
    sandlock_or_skip()
    answered, complaints = suite(user).communicate(timeout=300)
    assert suite(user).returncode == 0, complaints
    return {name: (outcome, reason) for name, outcome, reason in json.loads(answered)}


@pytest.mark.slow
@pytest.mark.parametrize(("user", "name"), [(user, name) for user, names in CHECKS_AS.items() for name in names])
def test_conformance(user: str, name: str) -> None:
    outcome, reason = results(user)[name]
    if outcome == "not applicable":
        pytest.skip(reason)
    assert outcome == ("cannot" if name in CANNOT_AS[user] else "passed"), reason
