"""What every environment relies on: what a command says, what stays between commands, what a time-out costs."""

from __future__ import annotations

import asyncio
import signal
import time

from backtalk.errors import ConfigError
from backtalk.sandboxes.base import HOME
from backtalk.sandboxes.conformance.base import LIMITS, Box, Category, Failure, expect, made, same


async def output_and_exit_code(box: Box) -> None:
    """A command's stdout and stderr come back as they were interleaved, with its exit code."""
    result = await box.run("echo one; echo two >&2; (exit 3)")
    same((result.output, result.exit_code, result.timed_out, result.dropped_bytes), ("one\ntwo\n", 3, False, 0))
    same((await box.run("nosuchcommand-at-all")).exit_code, 127)


async def signal_exit_code(box: Box) -> None:
    """A program that a signal ended has exit code 128 and the signal's number."""
    same((await box.run("sh -c 'kill -SEGV $$'")).exit_code, 128 + signal.SIGSEGV)


async def seconds_are_measured(box: Box) -> None:
    """A result tells how long its command ran."""
    expect(0.1 <= (await box.run("sleep 0.1")).seconds < 20, "`sleep 0.1` was not measured as such")


async def odd_bytes(box: Box) -> None:
    """Bytes that are no UTF-8 become replacement characters, and the rest is untouched."""
    same(await box.out(r"printf 'a\0b\xff\xc3\xa9\n'"), "a\0b\N{REPLACEMENT CHARACTER}é\n")
    same(await box.out("echo 'ünïcödé 漢字'"), "ünïcödé 漢字\n")


async def output_cap(box: Box) -> None:
    """Output beyond the limit is cut at a whole character, counted and dropped."""
    result = await box.run("seq 1000000")
    same(len(result.output), LIMITS.output_bytes)
    same(len(result.output) + result.dropped_bytes, 6_888_896)
    half = LIMITS.output_bytes // 2
    result = await box.run(f"printf a; head -c {half} /dev/zero | sed 's/\\x00/é/g'")
    same((result.output, result.dropped_bytes), ("a" + "é" * (half - 1), 2))
    same(await box.out("echo fine"), "fine\n")


async def endless_output(box: Box) -> None:
    """A command that prints without end is stopped at its time limit and costs the trainer no whole core."""
    began = time.process_time()
    result = await box.run("yes", timeout_s=1)
    same((result.timed_out, result.exit_code, len(result.output)), (True, -1, LIMITS.output_bytes))
    expect(result.dropped_bytes > 0, "nothing was counted as dropped")
    same(await box.out("echo fine"), "fine\n")
    expect(time.process_time() - began < 5, "the trainer spent whole seconds on reading what nobody keeps")


async def empty_standard_input(box: Box) -> None:
    """A command that reads its standard input finds the end of it."""
    same(await box.out("cat; read line; echo read $?"), "read 1\n")


async def any_text_is_a_command(box: Box) -> None:
    """Unfinished and broken bash text is an error message, not a session that hangs."""
    for broken in ("if", "echo 'open", "cat <<E", ")", "}", "done", "$(", "\\", "", "# nothing"):
        expect(not (await box.run(broken)).timed_out, f"{broken!r} hung")
    quoted = "$x 'quoted' \"both\" `tick` \\back\n"
    same(await box.out(f"cat <<'E'\n{quoted}E\n"), quoted)
    same(await box.out("echo fine"), "fine\n")


async def long_commands(box: Box) -> None:
    """A command of 300,000 characters runs."""
    same(await box.out(f"v={'x' * 300_000}; echo ${{#v}}"), "300000\n")


async def loop_words(box: Box) -> None:
    """`break`, `return`, `exec`, `set -n` and their like end at most a shell, never the session."""
    for word in ("break", "continue 9", "return 7", "exec true", "set -n", "set -eu; false", "exec >/dev/null 2>&1"):
        await box.run(word, timeout_s=2)
        await box.run("exit", timeout_s=2)  # whatever it changed is the old shell's
        same(await box.out("echo still here"), "still here\n", word)


async def starts_at_home(box: Box) -> None:
    """A session starts in /home/agent, in an empty folder where it can write."""
    same((await box.out("pwd")).rstrip("\n")[-len(HOME) :], HOME)
    same(await box.out("ls -A; echo 1 >f && cat f"), "1\n")


async def session_persists(box: Box) -> None:
    """Folder, variables, functions and options stay from one command to the next."""
    await box.run("cd /usr; export A='1 2'; b=3; f() { echo f$1; }; shopt -s extglob; declare -A map=([k]=v)")
    same(await box.out('pwd; echo "$A" $b; f 4; echo ${map[k]}; bash -c "echo $A"'), "/usr\n1 2 3\nf4\nv\n1 2\n")


async def background_jobs(box: Box) -> None:
    """A background job does not hold a command up, lives on, and can be ended by a later command."""
    result = await box.run("sleep 1000 & echo started")
    same(result.output, "started\n")
    expect(result.seconds < 15, "the command waited for its background job")
    same(await box.out("kill %1; wait %1; echo $?"), "143\n")


async def local_server(box: Box) -> None:
    """A server on loopback answers later commands, as tasks with a web server need."""
    serve = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    await box.python("pass")
    await box.run(f"python3 -c \"{serve}; s.accept()[0].send(b'hello')\" >port 2>/dev/null & disown")
    wait = "for i in {1..200}; do [[ -s port ]] && break; sleep .05; done"
    same(await box.out(f"{wait}; cat </dev/tcp/127.0.0.1/$(<port)"), "hello")


async def environment_of_one_command(box: Box) -> None:
    """`env` holds for one command alone, whatever the values contain, and a bad name is refused."""
    result = await box.sandbox.exec('echo "$X"; printenv X', timeout_s=20, env={"X": "a 'b' $c"})
    same(result.output, "a 'b' $c\na 'b' $c\n")
    same(await box.out('echo "[$X]"'), "[]\n")
    try:
        await box.sandbox.exec("true", timeout_s=20, env={"A B": "1"})
    except ConfigError:
        return
    raise Failure("the variable name 'A B' was taken")


async def folder_of_a_command(box: Box) -> None:
    """`cwd` moves the session there before the command, and a missing folder is an exit code."""
    await box.put(f"{HOME}/sub/file")
    result = await box.sandbox.exec("basename $PWD; ls", timeout_s=20, cwd=f"{HOME}/sub")
    same(result.output, "sub\nfile\n")
    result = await box.sandbox.exec("echo not reached", timeout_s=20, cwd=f"{HOME}/none")
    expect(result.exit_code != 0 and "not reached" not in result.output, f"a missing folder gave {result}")


async def time_limit(box: Box) -> None:
    """A command over its time limit is killed with all it started; older jobs, folder and exports live on."""
    await box.run("mkdir here; cd here; export KEPT=yes; echo file >a; sleep 1001 & echo $! >job")
    began = time.monotonic()
    command = "echo before; (setsid sleep 1003 & echo $! >late; wait) & bash -c 'sleep 1002; true'"
    result = await box.run(command, timeout_s=0.5)
    same((result.output, result.exit_code, result.timed_out), ("before\n", -1, True))
    expect(time.monotonic() - began < 15, "the time limit came late")
    same(await box.out("basename $PWD; echo $KEPT; cat a; kill -0 $(<job) && echo lives"), "here\nyes\nfile\nlives\n")
    state = await box.out("cut -d' ' -f3 /proc/$(<late)/stat 2>/dev/null")
    expect(state.strip() in ("", "Z", "X"), "a process of the command in a session of its own lives on")


async def time_limit_holds_for_anything(box: Box) -> None:
    """Busy loops, ignored signals, a stopped shell and reads of a terminal end at the time limit too."""
    for command in ("while :; do :; done", "trap '' TERM INT; sleep 99", "kill -STOP $$", "read </dev/tty"):
        began = time.monotonic()
        await box.run(command, timeout_s=0.3)
        expect(time.monotonic() - began < 15, f"{command!r} took {time.monotonic() - began:.0f} s")
        same(await box.out("echo fine"), "fine\n", command)


async def end_of_the_shell(box: Box) -> None:
    """A command that ends the shell is an exit code; folder, exports and background jobs live on."""
    await box.run("mkdir here; cd here; export KEPT=yes; sleep 1011 & echo $! >job")
    result = await box.run("echo bye; exit 5")
    same((result.output, result.exit_code), ("bye\n", 5))
    same((await box.run("exec false")).exit_code, 1)
    same((await box.run("kill -9 $$")).exit_code, 137)
    same(await box.out("basename $PWD; echo $KEPT; kill -0 $(<job) && echo lives"), "here\nyes\nlives\n")


async def cancelled_command(box: Box) -> None:
    """A command whose caller was cancelled is stopped and does not disturb the next one."""
    task = asyncio.create_task(box.run("echo partial; sleep 1021"))
    await asyncio.sleep(0.3)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        same((await box.run("echo next")).exit_code, 0)
        same(await box.out("echo fine"), "fine\n")
    else:
        raise Failure("a cancelled command gave a result")


async def non_blocking_output(box: Box) -> None:
    """A program that makes its output non-blocking does so for one command, not for all that follow."""
    await box.python("import fcntl, os; fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)")
    result = await box.run("seq 100000")
    same((result.exit_code, len(result.output) + result.dropped_bytes), (0, 588_895))


async def usual_tools(box: Box) -> None:
    """The tools that shell tasks are made of are there."""
    tools = "bash ls cat grep head tail wc sort uniq cut awk find stat diff tar sed tr tee xargs mktemp env"
    same(await box.out(f"for t in {tools}; do command -v $t >/dev/null || echo no $t; done"), "")


async def writable_places(box: Box) -> None:
    """An agent can write where tasks put things, temporary folders and shared memory among them."""
    places = f"{HOME} /srv /var/log /app /etc/x /logs /tests /tmp /var/tmp /dev/shm /opt/y /data"
    same(await box.out(f"for p in {places}; do {{ mkdir -p $p && echo 1 >$p/f; }} 2>/dev/null || echo no $p; done"), "")
    same(await box.out("echo to >/dev/stderr; echo out >/dev/stdout; echo gone >/dev/null"), "to\nout\n")


CHECKS = made(
    Category.BEHAVIOUR,
    output_and_exit_code,
    signal_exit_code,
    seconds_are_measured,
    odd_bytes,
    output_cap,
    endless_output,
    empty_standard_input,
    any_text_is_a_command,
    long_commands,
    loop_words,
    starts_at_home,
    session_persists,
    background_jobs,
    local_server,
    environment_of_one_command,
    folder_of_a_command,
    time_limit,
    time_limit_holds_for_anything,
    end_of_the_shell,
    cancelled_command,
    non_blocking_output,
    usual_tools,
) + made(Category.BEHAVIOUR, writable_places, harmful_if_open=True)
