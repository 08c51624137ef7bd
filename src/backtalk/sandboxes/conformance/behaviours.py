"""Checks of behaviour that every environment relies on: output, exit codes, the session's state, time-outs."""

from __future__ import annotations

import asyncio
import signal
import time

from backtalk.errors import ConfigError
from backtalk.sandboxes.base import HOME
from backtalk.sandboxes.conformance.base import LIMITS, SandboxUnderTest, equal, expect, raises, within


async def output_and_exit_code(sandbox: SandboxUnderTest) -> None:
    """Check that a command's stdout and stderr come back as they were interleaved, with its exit code."""
    result = await sandbox.exec("echo one; echo two >&2; (exit 3)")
    equal((result.output, result.exit_code, result.timed_out, result.dropped_bytes), ("one\ntwo\n", 3, False, 0))
    equal((await sandbox.exec("nosuchcommand-at-all")).exit_code, 127)


async def signal_exit_code(sandbox: SandboxUnderTest) -> None:
    """Check that a program ended by a signal has exit code 128 plus the signal's number."""
    equal((await sandbox.exec("sh -c 'kill -SEGV $$'")).exit_code, 128 + signal.SIGSEGV)


async def seconds_are_measured(sandbox: SandboxUnderTest) -> None:
    """Check that a result has the seconds that its command ran."""
    expect(0.1 <= (await sandbox.exec("sleep 0.1")).seconds < 20, "`sleep 0.1` was not measured as such")


async def odd_bytes(sandbox: SandboxUnderTest) -> None:
    """Check that bytes that are not UTF-8 become replacement characters, and the rest is unchanged."""
    await sandbox.prints(r"printf 'a\0b\xff\xc3\xa9\n'", "a\0b\N{REPLACEMENT CHARACTER}é\n")
    await sandbox.prints("echo 'ünïcödé 漢字'", "ünïcödé 漢字\n")


async def output_cap(sandbox: SandboxUnderTest) -> None:
    """Check that output beyond the limit is cut at a whole character, counted and dropped."""
    result = await sandbox.exec("seq 1000000")
    equal(len(result.output), LIMITS.output_bytes)
    equal(len(result.output) + result.dropped_bytes, 6_888_896)
    half = LIMITS.output_bytes // 2
    result = await sandbox.exec(f"printf a; head -c {half} /dev/zero | sed 's/\\x00/é/g'")
    equal((result.output, result.dropped_bytes), ("a" + "é" * (half - 1), 2))
    await sandbox.still_works()


async def endless_output(sandbox: SandboxUnderTest) -> None:
    """Check that a command that prints without end is stopped at its time limit and costs the trainer no whole core."""
    began = time.process_time()
    result = await sandbox.exec("yes", timeout_s=1)
    equal((result.timed_out, result.exit_code, len(result.output)), (True, -1, LIMITS.output_bytes))
    expect(result.dropped_bytes > 0, "nothing was counted as dropped")
    await sandbox.still_works()
    expect(time.process_time() - began < 5, "the trainer spent whole seconds on reading what nobody keeps")


async def any_text_is_a_command(sandbox: SandboxUnderTest) -> None:
    """Check that incomplete and invalid bash gives an error message, not a session that hangs."""
    for broken in ("if", "echo 'open", "cat <<E", ")", "}", "done", "$(", "\\", "", "# nothing"):
        expect(not (await sandbox.exec(broken)).timed_out, f"{broken!r} hung")
    quoted = "$x 'quoted' \"both\" `tick` \\back\n"
    await sandbox.prints(f"cat <<'E'\n{quoted}E\n", quoted)
    await sandbox.still_works()


async def loop_words(sandbox: SandboxUnderTest) -> None:
    """Check that `break`, `return`, `exec`, `set -n` and the like end a shell at most, never the session."""
    for word in ("break", "continue 9", "return 7", "exec true", "set -n", "set -eu; false", "exec >/dev/null 2>&1"):
        await sandbox.exec(word, timeout_s=2)
        await sandbox.exec("exit", timeout_s=2)  # whatever it changed is the old shell's
        await sandbox.prints("echo still here", "still here\n", word)


async def starts_at_home(sandbox: SandboxUnderTest) -> None:
    """Check that a session starts in /home/agent, which is empty and can be written."""
    equal((await sandbox.output("pwd")).rstrip("\n")[-len(HOME) :], HOME)
    await sandbox.prints("ls -A; echo 1 >f && cat f", "1\n")


async def session_persists(sandbox: SandboxUnderTest) -> None:
    """Check that folder, variables, functions and options stay from one command to the next."""
    await sandbox.exec("cd /usr; export A='1 2'; b=3; f() { echo f$1; }; shopt -s extglob; declare -A map=([k]=v)")
    await sandbox.prints('pwd; echo "$A" $b; f 4; echo ${map[k]}; bash -c "echo $A"', "/usr\n1 2 3\nf4\nv\n1 2\n")


async def background_jobs(sandbox: SandboxUnderTest) -> None:
    """Check that a background job does not delay its command, lives on, and can be ended by a later command."""
    result = await sandbox.exec("sleep 1000 & echo started")
    equal(result.output, "started\n")
    expect(result.seconds < 15, "the command waited for its background job")
    await sandbox.prints("kill %1; wait %1; echo $?", "143\n")


async def local_server(sandbox: SandboxUnderTest) -> None:
    """Check that a server on loopback answers later commands, as tasks with a web server need."""
    serve = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    await sandbox.python("pass")
    await sandbox.exec(f"python3 -c \"{serve}; s.accept()[0].send(b'hello')\" >port 2>/dev/null & disown")
    wait = "for i in {1..200}; do [[ -s port ]] && break; sleep .05; done"
    await sandbox.prints(f"{wait}; cat </dev/tcp/127.0.0.1/$(<port)", "hello")


async def environment_of_one_command(sandbox: SandboxUnderTest) -> None:
    """Check that `env` holds for one command alone, whatever the values contain, and a bad name is refused."""
    result = await sandbox.exec('echo "$X"; printenv X', env={"X": "a 'b' $c"})
    equal(result.output, "a 'b' $c\na 'b' $c\n")
    await sandbox.prints('echo "[$X]"', "[]\n")
    with raises(ConfigError, "the variable name 'A B' was taken"):
        await sandbox.exec("true", env={"A B": "1"})


async def folder_of_a_command(sandbox: SandboxUnderTest) -> None:
    """Check that `cwd` moves the session there before the command, and a missing folder is an exit code."""
    await sandbox.put(f"{HOME}/sub/file")
    result = await sandbox.exec("basename $PWD; ls", cwd=f"{HOME}/sub")
    equal(result.output, "sub\nfile\n")
    result = await sandbox.exec("echo not reached", cwd=f"{HOME}/none")
    expect(result.exit_code != 0 and "not reached" not in result.output, f"a missing folder gave {result}")


async def time_limit(sandbox: SandboxUnderTest) -> None:
    """Check that a command over its time limit is killed with all it started; older jobs, folder and exports stay."""
    await sandbox.exec("mkdir here; cd here; export KEPT=yes; echo file >a; sleep 1001 & echo $! >job")
    command = "echo before; (setsid sleep 1003 & echo $! >late; wait) & bash -c 'sleep 1002; true'"
    with within(15, "a time limit of 0.5 s"):
        result = await sandbox.exec(command, timeout_s=0.5)
    equal((result.output, result.exit_code, result.timed_out), ("before\n", -1, True))
    await sandbox.prints("basename $PWD; echo $KEPT; cat a; kill -0 $(<job) && echo lives", "here\nyes\nfile\nlives\n")
    state = await sandbox.output("cut -d' ' -f3 /proc/$(<late)/stat 2>/dev/null")
    expect(state.strip() in ("", "Z", "X"), "a process of the command in a session of its own lives on")


async def time_limit_holds_for_anything(sandbox: SandboxUnderTest) -> None:
    """Check that busy loops, ignored signals, a stopped shell and reads of a terminal end at the time limit too."""
    for command in ("while :; do :; done", "trap '' TERM INT; sleep 99", "kill -STOP $$", "read </dev/tty"):
        with within(15, repr(command)):
            await sandbox.exec(command, timeout_s=0.3)
        await sandbox.still_works(after=command)


async def end_of_the_shell(sandbox: SandboxUnderTest) -> None:
    """Check that a command that ends the shell is an exit code; folder, exports and background jobs stay."""
    await sandbox.exec("mkdir here; cd here; export KEPT=yes; sleep 1011 & echo $! >job")
    result = await sandbox.exec("echo bye; exit 5")
    equal((result.output, result.exit_code), ("bye\n", 5))
    equal((await sandbox.exec("exec false")).exit_code, 1)
    equal((await sandbox.exec("kill -9 $$")).exit_code, 137)
    await sandbox.prints("basename $PWD; echo $KEPT; kill -0 $(<job) && echo lives", "here\nyes\nlives\n")


async def cancelled_command(sandbox: SandboxUnderTest) -> None:
    """Check that a command whose caller was cancelled is stopped and does not disturb the next one."""
    task = asyncio.create_task(sandbox.exec("echo partial; sleep 1021"))
    await asyncio.sleep(0.3)
    task.cancel()
    with raises(asyncio.CancelledError, "a cancelled command gave a result"):
        await task
    equal((await sandbox.exec("echo next")).exit_code, 0)
    await sandbox.still_works()


async def non_blocking_output(sandbox: SandboxUnderTest) -> None:
    """Check that a program that makes its output non-blocking does so for one command, not for all that follow."""
    await sandbox.python("import fcntl, os; fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)")
    result = await sandbox.exec("seq 100000")
    equal((result.exit_code, len(result.output) + result.dropped_bytes), (0, 588_895))


async def writable_places(sandbox: SandboxUnderTest) -> None:
    """Check that an agent can write where tasks put things, temporary folders and shared memory among them."""
    paths = f"{HOME} /srv /var/log /app /etc/x /logs /tests /tmp /var/tmp /dev/shm /opt/y /data"
    write = "mkdir -p $p && echo 1 >$p/f"
    await sandbox.prints(f"for p in {paths}; do {{ {write}; }} 2>/dev/null || echo no $p; done", "")
    await sandbox.prints("echo to >/dev/stderr; echo out >/dev/stdout; echo gone >/dev/null", "to\nout\n")


_TOOLS = "bash ls cat grep head tail wc sort uniq cut awk find stat diff tar sed tr tee xargs mktemp env"
# Checks of what a command prints: the claim, the command and the text.
CASES = {
    SandboxUnderTest.prints: {
        "empty_standard_input": ("Standard input is empty.", "cat; read line; echo read $?", "read 1\n"),
        "long_commands": ("A command of 300,000 characters runs.", f"v={'x' * 300_000}; echo ${{#v}}", "300000\n"),
        "usual_tools": ("The usual tools of shell tasks are installed.",
                        f"for t in {_TOOLS}; do command -v $t >/dev/null || echo no $t; done", ""),
    },
}  # fmt: skip
HARMFUL_IF_OPEN = "writable_places".split()
