"""One session: what stays between commands, what a time-out costs, files in and out, restart, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from backtalk.errors import ConfigError, SandboxError
from backtalk.sandboxes import ExecResult, SandboxFile, SandboxLimits, local_sandbox
from backtalk.sandboxes.bubblewrap import BubblewrapBackend, BubblewrapSandbox
from sandbox_help import backend_or_skip, children, groups, open_files, started, with_argument

COUNT = "all=(/proc/[0-9]*); echo ${#all[@]}"  # of processes, by bash alone: 2 are the supervisor and the shell


@pytest.fixture(scope="module")
def backend() -> BubblewrapBackend:
    return backend_or_skip()


@pytest_asyncio.fixture
async def box(backend: BubblewrapBackend) -> AsyncIterator[BubblewrapSandbox]:
    async with backend.open(SandboxLimits()) as sandbox:
        yield sandbox


async def run(box: BubblewrapSandbox, command: str, timeout_s: float = 20.0) -> ExecResult:
    return await box.exec(command, timeout_s=timeout_s)


async def out(box: BubblewrapSandbox, command: str) -> str:
    return (await run(box, command)).output


# What a command says


async def test_output_and_exit_code(box: BubblewrapSandbox) -> None:
    result = await run(box, "echo one; echo two >&2; (exit 3)")
    assert (result.output, result.exit_code, result.timed_out, result.dropped_bytes) == ("one\ntwo\n", 3, False, 0)
    assert (await run(box, "sh -c 'kill -SEGV $$'")).exit_code == 128 + signal.SIGSEGV
    assert 0.1 < (await run(box, "sleep 0.1")).seconds < 5


async def test_output_of_odd_bytes(box: BubblewrapSandbox) -> None:
    assert await out(box, r"printf 'a\0b\xff\xc3\xa9\n'") == "a\0b\N{REPLACEMENT CHARACTER}é\n"
    assert await out(box, "echo 'ünïcödé 漢字'") == "ünïcödé 漢字\n"
    assert await out(box, "echo a\0b") == "ab\n"  # bash cannot hold a NUL byte


async def test_output_beyond_the_limit_is_counted(backend: BubblewrapBackend) -> None:
    async with backend.open(SandboxLimits(output_bytes=100)) as box:
        result = await run(box, "seq 1000000")
        assert result.output == "".join(f"{n}\n" for n in range(1, 40))[:100]
        assert len(result.output) + result.dropped_bytes == 6_888_896
        result = await run(box, "for i in {1..60}; do printf é; done")
        assert (result.output, result.dropped_bytes) == ("é" * 50, 20)
        result = await run(box, "printf a; for i in {1..60}; do printf é; done")
        assert (result.output, result.dropped_bytes) == ("a" + "é" * 49, 22)  # no half character
        assert await out(box, "echo fine") == "fine\n"


async def test_endless_output_ends_at_the_time_limit(box: BubblewrapSandbox) -> None:
    began = time.process_time()
    result = await run(box, "yes", timeout_s=1)
    assert result.timed_out and result.exit_code == -1
    assert len(result.output) == 65_536 and result.dropped_bytes > 1_000_000
    assert time.process_time() - began < 0.9  # reading what nobody keeps does not take a whole core
    result = await run(box, "cat /dev/zero & sleep 0.1; echo seen")  # nor does it when the job is in the background
    assert result.exit_code == 0
    await run(box, "kill %1; wait")


async def test_standard_input_is_empty(box: BubblewrapSandbox) -> None:
    assert await out(box, "cat; read line; echo read $?") == "read 1\n"
    assert await out(box, "ls /proc/self/fd | wc -l") == "4\n"  # 0, 1, 2 and the one ls itself opens


async def test_commands_may_be_written_anyhow(box: BubblewrapSandbox) -> None:
    assert (
        await out(box, "cat <<'E'\n$x 'quoted' \"both\" `tick` \\back\nE\n") == "$x 'quoted' \"both\" `tick` \\back\n"
    )
    assert (await run(box, "")).exit_code == 0
    assert (await run(box, "# nothing")).exit_code == 0
    for broken in ("if", "echo 'open", "cat <<E", ")", "}", "done", "$(", "\\"):
        result = await run(box, broken)
        assert not result.timed_out, broken
    assert await out(box, "nosuchcommand") == "bash: line 1: nosuchcommand: command not found\n"
    long = "x" * 300_000
    assert await out(box, f"v={long}; echo ${{#v}}") == "300000\n"


@pytest.mark.parametrize("word", ["break", "continue", "break 9", "continue 9", "return 7", "exec true", "set -n"])
async def test_words_that_leave_a_loop_do_not_leave_the_session(box: BubblewrapSandbox, word: str) -> None:
    await run(box, word, timeout_s=2)
    assert await out(box, "echo still here") == "still here\n"


@pytest.mark.parametrize(
    "command",
    [
        "set -euo pipefail",
        "IFS=0123456789abcdef",
        "printf() { :; }; read() { :; }; eval() { :; }; export() { :; }",
        "exec >/dev/null 2>&1",
        "exec 3<&- 4>&- 5>&- 10<&- 11>&-",
        "trap 'echo trapped' DEBUG EXIT ERR",
        "trap '' INT TERM HUP CHLD",
        "shopt -s expand_aliases; alias echo=false while=false",
        "unset PWD PATH HOME IFS; PATH=/usr/bin:/bin",
        "for fd in /proc/$$/fd/*; do echo done 1 0 >$fd; done",
        "printf 'done %s 0\\0/\\0x 9\\0\\0' {a..z} >/proc/$$/fd/4",
        "printf 'exit 1 1\\0ready 1\\0' >/proc/1/fd/4",
        "cat /proc/1/fd/3 & sleep 0.2",
        "for f in /proc/{1,$$}/fd/*; do chmod 777 $f; echo 'echo evil >&2; exit' >$f; truncate -s 9 $f; done",
        "kill -9 -1",
        "kill -9 $$",
        "kill -STOP $$",
        "export BIG=$(head -c 100000 /dev/zero | tr '\\0' x)",
        "mkdir gone; cd gone; rmdir ../gone",
        "ulimit -n 3; ulimit -u 1",
        "readonly __id __code __line",
        "cat /dev/zero >/proc/$$/fd/4 & sleep 0.3",
        "yes >/proc/$$/fd/4 & sleep 0.3",
        "mv ~ /gone; mv /tmp /t; mv /run /r",
        "rm -rf ~ /tmp; ln -s /nowhere ~; touch /tmp",
    ],
)
async def test_a_hostile_command_costs_at_most_its_own_session(box: BubblewrapSandbox, command: str) -> None:
    await run(box, command, timeout_s=1)
    for _ in range(3):  # a forged report may be taken for the answer to the next command, once
        with contextlib.suppress(TimeoutError):
            await run(box, "true", timeout_s=1)
    await box.restart()
    result = await run(box, "echo $((6 * 7)); pwd")
    assert (result.output, result.exit_code) == ("42\n/home/agent\n", 0)


# What stays


async def test_the_session_goes_on(box: BubblewrapSandbox) -> None:
    await run(box, "cd /srv; export A='1 2'; b=3; f() { echo f$1; }; shopt -s extglob; declare -A map=([k]=v)")
    assert await out(box, 'pwd; echo "$A" $b; f 4; echo ${map[k]}; bash -c "echo $A"') == "/srv\n1 2 3\nf4\nv\n1 2\n"


async def test_background_jobs_live_on_and_do_not_hold_up(box: BubblewrapSandbox) -> None:
    result = await run(box, "sleep 1000 & echo started")
    assert result.output == "started\n" and result.seconds < 10
    assert "sleep 1000" in await out(box, "jobs")
    assert await out(box, "kill %1; wait %1; echo $?") == "143\n"
    await run(box, "python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 & disown")
    connect = "for i in {1..50}; do exec 9<>/dev/tcp/127.0.0.1/8000 && break; sleep .1; done 2>/dev/null"
    assert await out(box, f"{connect}; echo hi >&9 && echo up") == "up\n"


async def test_environment_of_one_command_and_folder_of_the_session(box: BubblewrapSandbox) -> None:
    result = await box.exec('echo "$X"; printenv X; pwd', timeout_s=20, env={"X": "a 'b' $c"}, cwd="/srv")
    assert result.output == "a 'b' $c\na 'b' $c\n/srv\n"
    assert await out(box, 'echo "[$X]"; pwd') == "[]\n/srv\n"
    result = await box.exec("echo not reached", timeout_s=20, cwd="/none")
    assert (result.output, result.exit_code) == ("bash: line 1: cd: /none: No such file or directory\n", 1)
    with pytest.raises(ConfigError, match="not a name"):
        await box.exec("true", timeout_s=20, env={"A B": "1"})


# Time limits and ends


async def test_time_limit_kills_the_tree_and_keeps_the_rest(box: BubblewrapSandbox) -> None:
    await run(box, "cd /srv; export KEPT=yes; echo file >a; sleep 7001 &")
    began = time.monotonic()
    result = await run(
        box, "echo before; sleep 7002 & (setsid sleep 7003 &); bash -c 'sleep 7004; true'", timeout_s=0.5
    )
    assert (result.output, result.exit_code, result.timed_out) == ("before\n", -1, True)
    assert time.monotonic() - began < 5
    assert await out(box, "pwd; echo $KEPT; cat a; pgrep -a sleep | cut -d' ' -f2-") == "/srv\nyes\nfile\nsleep 7001\n"
    assert started("7001") and not with_argument("7003")


@pytest.mark.parametrize(
    "command", ["while :; do :; done", "trap '' TERM INT; sleep 99", "kill -STOP $$", "read </dev/tty"]
)
async def test_time_limit_holds_for_anything(box: BubblewrapSandbox, command: str) -> None:
    began = time.monotonic()
    await run(box, command, timeout_s=0.3)
    assert time.monotonic() - began < 5
    assert await out(box, "echo fine") == "fine\n"


async def test_ending_the_shell_is_an_exit_code(box: BubblewrapSandbox) -> None:
    await run(box, "cd /srv; export KEPT=yes; sleep 7011 &")
    result = await run(box, "echo bye; exit 5")
    assert (result.output, result.exit_code) == ("bye\n", 5)
    assert (await run(box, "exec false")).exit_code == 1
    assert (await run(box, "kill -9 $$")).exit_code == 137
    assert await out(box, "pwd; echo $KEPT; pgrep -c sleep") == "/srv\nyes\n1\n"


async def test_a_cancelled_command_does_not_disturb_the_next(box: BubblewrapSandbox) -> None:
    task = asyncio.create_task(run(box, "echo partial; sleep 7021"))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await run(box, "echo next")).exit_code == 0
    assert await out(box, "pgrep -c sleep") == "0\n"


# Files


async def test_put_and_get(box: BubblewrapSandbox) -> None:
    binary = bytes(range(256)) * 400
    await box.put(
        {
            "/app/deep/er/data.bin": SandboxFile(binary),
            "/home/agent/run.sh": SandboxFile(b"#!/bin/bash\necho ran\n", mode=0o755, mtime=1_700_000_000),
            "/etc/app.conf": SandboxFile(b""),
            "/srv/a name\nwith 'all' \"kinds\" é": SandboxFile(b"x", mode=0o600),
        }
    )
    assert await box.get("/app/deep/er/data.bin") == binary
    assert await box.get("/etc/app.conf") == b""
    assert await box.get("/srv/a name\nwith 'all' \"kinds\" é") == b"x"
    assert (
        await out(box, "./run.sh; stat -c '%a %U %Y' run.sh; stat -c %a /app/deep/er")
        == "ran\n755 agent 1700000000\n755\n"
    )
    await run(box, "echo mine >>/app/deep/er/data.bin")
    assert await box.get("/app/deep/er/data.bin") == binary + b"mine\n"
    with pytest.raises(ConfigError, match="absolute"):
        await box.put({"notes.txt": SandboxFile(b"")})


async def test_get_of_what_is_no_file(box: BubblewrapSandbox) -> None:
    await run(box, "mkfifo pipe; mkdir dir; ln -s /nowhere broken; ln -s loop loop; echo x >secret; chmod 0 secret")
    for path in ("pipe", "dir", "broken", "loop", "secret", "missing"):
        assert await box.get(f"/home/agent/{path}") is None, path
    assert await box.get("/dev/zero") is None
    await run(box, "head -c 5000 /dev/zero >big; truncate -s 60M huge")
    assert await box.get("/home/agent/big", max_bytes=5000) == bytes(5000)
    with pytest.raises(SandboxError, match="larger than 4999"):
        await box.get("/home/agent/big", max_bytes=4999)
    with pytest.raises(SandboxError, match="larger than"):
        await box.get("/home/agent/huge")
    assert await out(box, "echo fine") == "fine\n"


async def test_links_of_the_guest_never_lead_to_the_host(
    box: BubblewrapSandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    host = tmp_path_factory.mktemp("host")
    host.chmod(0o777)
    (host / "secret").write_text("host")
    await run(box, f"mkdir -p {host}; echo guest >{host}/secret; ln -s {host} link; ln -s {host}/secret direct")
    assert await box.get("/home/agent/link/secret") == b"guest\n"
    assert await box.get("/home/agent/direct") == b"guest\n"
    await box.put({"/home/agent/link/new": SandboxFile(b"n"), "/home/agent/direct": SandboxFile(b"d")})
    assert sorted(os.listdir(host)) == ["secret"] and (host / "secret").read_text() == "host"
    assert await out(box, f"cat {host}/secret") == "guest\n"  # put replaced the link itself
    await run(box, "ln -s /proc/1/root/etc/shadow shadow; ln -s /proc/1/root up")
    assert await box.get("/home/agent/shadow") is None
    assert await box.get("/home/agent/up/etc/shadow") is None


async def test_put_wins_over_what_is_in_the_way(box: BubblewrapSandbox) -> None:
    await run(box, "rm -rf /tests; echo file >/tests; mkdir -p /app/x/full/of; touch /app/x/full/of/things")
    await run(box, "mkdir -p /srv/shut/in; chmod 0 /srv/shut/in /srv/shut; chmod 0 /app/x/full; ln -s / /logs/l")
    paths = ["/tests/test.sh", "/app/x", "/srv/shut/in/file", "/logs/l/made"]
    await box.put({path: SandboxFile(path.encode()) for path in paths})
    for path in paths:
        assert await box.get(path) == path.encode()


async def test_put_of_too_much_is_an_error_and_breaks_nothing(backend: BubblewrapBackend) -> None:
    async with backend.open(SandboxLimits(disk_mb=4)) as box:
        with pytest.raises(SandboxError, match="do not fit"):
            await box.put({"/srv/big": SandboxFile(bytes(6 << 20))})
        await run(box, "head -c 3M /dev/zero >/srv/half")
        with pytest.raises(SandboxError, match="could not write"):
            await box.put({"/srv/more": SandboxFile(bytes(2 << 20))})
        with pytest.raises(SandboxError, match="Read-only"):
            await box.put({"/usr/lib/new": SandboxFile(b"")})
        assert await out(box, "echo fine") == "fine\n"


# Restart and close


async def test_restart_ends_every_process_over_the_same_files(box: BubblewrapSandbox) -> None:
    await run(
        box,
        "cd /srv; export A=1; echo kept >f; (trap '' TERM HUP; setsid sleep 7031 & sleep 7032 &); nohup sleep 7033 &",
    )
    namespace = await out(box, "readlink /proc/self/ns/pid")
    await run(box, "echo 'echo hacked' >~/.bashrc; cp ~/.bashrc ~/.profile; cp ~/.bashrc ~/.bash_profile")
    await box.restart()
    assert not any(map(with_argument, ("7031", "7032", "7033")))
    assert await out(box, f"pwd; echo [$A]; cat /srv/f; {COUNT}") == "/home/agent\n[]\nkept\n2\n"
    assert await out(box, "readlink /proc/self/ns/pid") != namespace


async def test_restart_ends_a_fork_bomb(box: BubblewrapSandbox) -> None:
    await run(box, "bomb() { bomb | bomb & }; bomb", timeout_s=1)
    began = time.monotonic()
    await box.restart()
    assert time.monotonic() - began < 5
    assert await out(box, COUNT) == "2\n"


async def test_a_full_disk_does_not_keep_the_verifier_out(box: BubblewrapSandbox) -> None:
    assert "No space left" in await out(box, "cat /dev/zero >/srv/all; echo more >/srv/all2; cat /run/reserve")
    assert (await run(box, "rm -f /run/reserve; echo 1 >/run/reserve")).exit_code != 0
    await box.restart()
    await box.put({"/tests/test.sh": SandboxFile(b"echo ran" + b" " * 500_000)})
    assert await out(box, "bash /tests/test.sh; mkdir -p /logs/v && echo 0 >/logs/v/reward.txt") == "ran\n"
    assert await box.get("/logs/v/reward.txt") == b"0\n"


async def test_output_made_non_blocking_stays_so_for_one_command(box: BubblewrapSandbox) -> None:
    program = "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)"
    await run(box, f"command -v python3 && python3 -c '{program}'")
    assert await out(box, "seq 100000 | cat >/dev/null; seq 5000 | tail -n 1; seq 100000 | wc -l") == "5000\n100000\n"
    assert (await run(box, "seq 100000")).exit_code == 0


async def test_the_trainers_death_ends_everything() -> None:
    program = (
        "import asyncio\nfrom backtalk.sandboxes import *\nasync def main():\n"
        "  async with local_sandbox().open(SandboxLimits()) as box:\n"
        "    await box.exec('sleep 7071 & (setsid sleep 7071 &)', timeout_s=20)\n    print('up', flush=True)\n"
        "    await box.exec('sleep 7071', timeout_s=60)\nasyncio.run(main())\n"
    )
    backend_or_skip()
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    assert trainer.stdout is not None and await trainer.stdout.readline() == b"up\n"
    assert started("7071")
    trainer.kill()
    await trainer.communicate()
    until_s = time.monotonic() + 20  # a loaded machine takes its time
    while (with_argument("7071") or groups(trainer.pid)) and time.monotonic() < until_s:
        await asyncio.sleep(0.05)
    assert not with_argument("7071") and not groups(trainer.pid)


async def test_nothing_is_left_behind(backend: BubblewrapBackend) -> None:
    files, before = open_files(), children()
    async with backend.open(SandboxLimits()) as box:
        await run(box, "sleep 7041 & (setsid sleep 7042 &)")
        assert started("7041")
    assert not with_argument("7041") and not with_argument("7042")
    assert (open_files(), children(), groups()) == (files, before, [])
    with pytest.raises(SandboxError):
        await run(box, "true")


async def test_nothing_is_left_behind_by_a_cancelled_start_or_use(backend: BubblewrapBackend) -> None:
    files, before = open_files(), children()
    for wait_s in (0.0, 0.005, 0.02, 0.2):
        task = asyncio.create_task(_hold(backend))
        await asyncio.sleep(wait_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (open_files(), children(), groups()) == (files, before, [])


async def _hold(backend: BubblewrapBackend) -> None:
    async with backend.open(SandboxLimits()) as box:
        await run(box, "sleep 7051", timeout_s=60)


async def test_a_dead_sandbox_says_so_from_every_method(backend: BubblewrapBackend) -> None:
    before = children()
    async with backend.open(SandboxLimits()) as box:
        waiting = asyncio.create_task(run(box, "sleep 7061"))
        await asyncio.sleep(0.2)
        os.kill((set(children()) - set(before)).pop(), signal.SIGKILL)
        with pytest.raises(SandboxError):
            await waiting
        with pytest.raises(SandboxError):
            await run(box, "true")
        with pytest.raises(SandboxError):
            await box.put({"/srv/f": SandboxFile(b"")})
        with pytest.raises(SandboxError):
            await box.get("/srv/f")
        with pytest.raises(SandboxError):
            await box.restart()
    assert (children(), groups()) == (before, [])


async def test_many_at_once(backend: BubblewrapBackend) -> None:
    async def one(index: int) -> str:
        async with backend.open(SandboxLimits()) as box:
            await run(box, f"echo {index} >/tmp/me; sleep 0.1")
            return await out(box, f"cat /tmp/*; {COUNT}")

    assert await asyncio.gather(*map(one, range(16))) == [f"{index}\n2\n" for index in range(16)]


async def test_local_sandbox_inside_an_event_loop(backend: BubblewrapBackend) -> None:
    assert local_sandbox().report == local_sandbox("bubblewrap").report == backend.report
    with pytest.raises(ConfigError, match="unsafe"):
        local_sandbox("docker")  # type: ignore[arg-type]
