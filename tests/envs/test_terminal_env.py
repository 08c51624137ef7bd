"""The terminal, in the real sandbox: the token roles of what it returns, and that only the tests decide the reward."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from backtalk.envs.terminal import NEW_SHELL, TerminalConfig, TerminalEnv, _test_command, open_terminal_env
from backtalk.errors import ConfigError, SandboxError, SandboxUnavailable, TaskError, VerifierError
from backtalk.messages import Message, Part, ToolCall
from backtalk.sandboxes import local_sandbox
from backtalk.sandboxes.base import ExecResult, Sandbox, SandboxBackend, SandboxFile
from backtalk.tasks.task import Task
from backtalk.tasks.triage import triage_task
from backtalk.trajectory import TokenRole

OUT, SAID = TokenRole.ENV_OUTPUT, TokenRole.WARNING
CONFIG = TerminalConfig(command_timeout_s=10.0, max_output_chars=100)


@pytest.fixture(scope="module")
def backend() -> SandboxBackend:
    try:
        return local_sandbox()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


def task_of(test: str, **changed: Any) -> Task:
    parts: dict[str, Any] = {
        "id": "t",
        "instruction": "Count the lines of a.txt.\n",
        "files": {"/home/agent/a.txt": SandboxFile(b"one\ntwo\n")},
        "tests": {"test.sh": SandboxFile(test.encode())},
        "verifier_timeout_s": 10.0,
    }
    return Task(**(parts | changed))


RIGHT_ANSWER = """\
answer=$(cat /logs/agent/answer.txt) || answer=none
if [ "$answer" = 2 ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""


@pytest.fixture
async def env(backend: SandboxBackend) -> AsyncIterator[TerminalEnv]:
    async with open_terminal_env(task_of(RIGHT_ANSWER), backend, CONFIG) as env:
        await env.reset()
        yield env


def bash(command: str) -> ToolCall:
    return ToolCall("bash", {"command": command})


def submit(answer: str) -> ToolCall:
    return ToolCall("submit", {"answer": answer})


async def parts_of(env: TerminalEnv, command: str) -> list[tuple[str, TokenRole]]:
    step = await env.step(bash(command))
    (message,) = step.messages
    assert (message.role, message.tool) == ("tool", "bash")
    return [(part.text, part.role) for part in message.parts]


async def test_a_rollout(backend: SandboxBackend) -> None:
    async with open_terminal_env(task_of(RIGHT_ANSWER), backend, CONFIG) as env:
        assert await env.reset() == (
            Message("system", (Part(CONFIG.system_prompt, TokenRole.CONTEXT),)),
            Message("user", (Part("Count the lines of a.txt.", TokenRole.CONTEXT),)),
        )
        assert [tool.name for tool in env.tools] == ["bash", "submit"]
        assert await parts_of(env, "wc -l < a.txt") == [("2\n", OUT)]
        step = await env.step(submit("2"))
        assert (step.messages, step.done, step.submitted) == ((), True, True)
        assert await env.score() == 1.0


async def test_a_wrong_answer_and_none(backend: SandboxBackend) -> None:
    for answer in ("3", None):
        async with open_terminal_env(task_of(RIGHT_ANSWER), backend, CONFIG) as env:
            await env.reset()
            if answer is not None:
                await env.step(submit(answer))
            assert await env.score() == 0.0


async def test_who_said_what(env: TerminalEnv) -> None:
    assert await parts_of(env, "printf ab") == [("ab", OUT)]
    assert await parts_of(env, "true") == [("[no output]", SAID)]
    assert await parts_of(env, "false") == [("[exit code 1]", SAID)]
    assert await parts_of(env, "echo x; (exit 3)") == [("x\n", OUT), ("[exit code 3]", SAID)]
    assert await parts_of(env, "printf x; (exit 3)") == [("x", OUT), ("\n[exit code 3]", SAID)]
    assert await parts_of(env, "echo '[exit code 1]'") == [("[exit code 1]\n", OUT)]
    text, role = (await parts_of(env, "cat nowhere"))[0]
    assert "nowhere" in text and role is OUT


async def test_the_shell_lives_on_between_calls(env: TerminalEnv) -> None:
    await parts_of(env, "cd /srv; x=5; sleep 100 &")
    assert await parts_of(env, "pwd; echo $x; jobs -r | wc -l") == [("/srv\n5\n1\n", OUT)]


async def test_what_looks_like_a_notice_is_output_where_the_world_said_it(env: TerminalEnv) -> None:
    said = "[no output]\n[exit code 1]\n[5 characters left out]"
    assert await parts_of(env, f"printf '{said}'; exit_with() {{ return 3; }}; exit_with") == [
        (said, OUT),
        ("\n[exit code 3]", SAID),
    ]


async def test_a_time_out_is_told(backend: SandboxBackend) -> None:
    config = TerminalConfig(command_timeout_s=0.5)
    async with open_terminal_env(task_of(RIGHT_ANSWER), backend, config) as env:
        await env.reset()
        step = await env.step(bash("echo begun; sleep 60"))
        assert step.timed_out and not step.done
        output, said = step.messages[0].parts
        assert output.text.startswith("begun\n") and output.role is OUT
        assert said == Part(f"[timed out after 0.5 s; the command was stopped]\n{NEW_SHELL}", SAID)
        assert (await parts_of(env, "echo on"))[0] == ("on\n", OUT)


async def test_long_output_keeps_its_head_and_tail(env: TerminalEnv) -> None:
    step = await env.step(bash("seq 1 100; false"))
    whole = "".join(f"{i}\n" for i in range(1, 101))
    assert step.truncated
    assert [(part.text, part.role) for part in step.messages[0].parts] == [
        (whole[:50], OUT),
        (f"\n[{len(whole) - 100} characters left out]\n", SAID),
        (whole[-50:], OUT),
        ("[exit code 1]", SAID),
    ]


@pytest.mark.parametrize(
    ("kept", "parts"),
    [
        ("head", [("0123456789", OUT), ("\n[14 characters left out at the end]\n", SAID), ("[exit code 1]", SAID)]),
        (
            "tail",
            [("[14 characters left out at the beginning]\n", SAID), ("efghijklmn", OUT), ("\n[exit code 1]", SAID)],
        ),
        ("both", [("01234", OUT), ("\n[14 characters left out]\n", SAID), ("jklmn", OUT), ("\n[exit code 1]", SAID)]),
    ],
)
async def test_what_stays_of_a_long_output(backend: SandboxBackend, kept: Any, parts: list[tuple[str, Any]]) -> None:
    config = TerminalConfig(max_output_chars=10, truncate=kept)
    async with open_terminal_env(task_of(RIGHT_ANSWER), backend, config) as env:
        await env.reset()
        assert await parts_of(env, "printf 0123456789a; printf bcdefghijklmn; false") == parts
        assert await parts_of(env, "printf 0123456789") == [("0123456789", OUT)]


async def test_a_terminal_without_submit(backend: SandboxBackend) -> None:
    config = TerminalConfig(system_prompt="You work in a Linux shell.", tools=("bash",))
    test = "if [ -e done ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt"
    async with open_terminal_env(task_of(test), backend, config) as env:
        await env.reset()
        assert [tool.name for tool in env.tools] == ["bash"]
        step = await env.step(submit("2"))
        assert (step.done, step.messages[0].text) == (False, "[unknown tool submit; the tool is bash]")
        await parts_of(env, "touch done")
        assert await env.score() == 1.0


async def test_both_ends_of_an_output_beyond_the_sandbox_limit_are_read(env: TerminalEnv) -> None:
    step = await env.step(bash("printf %050d; head -c 200000 /dev/zero | tr '\\0' x; printf %050d"))
    notice = ("\n[65436 characters and 134564 bytes left out]\n", TokenRole.WARNING)  # 200,100 bytes, 65,536 kept
    assert step.truncated
    assert [(part.text, part.role) for part in step.messages[0].parts] == [("0" * 50, OUT), notice, ("0" * 50, OUT)]


async def test_of_a_bar_beyond_the_sandbox_limit_the_last_frame_is_read(env: TerminalEnv) -> None:
    parts = await parts_of(env, "for i in {10000..29999}; do printf '\\rframe %5d' $i; done")
    notice = ("\n[174464 bytes left out]\n", TokenRole.WARNING)  # 20,000 frames of 12 bytes, 65,536 of them kept
    assert parts == [("frame 12729", OUT), notice, ("frame 29999", OUT)]  # 32,768 bytes are 2,730 frames and 8 bytes


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (ToolCall("bash", {}), "[bash needs the argument command, a text]"),
        (ToolCall("bash", {"command": 42}), "[bash needs the argument command, a text]"),
        (ToolCall("submit", {"command": "x"}), "[submit needs the argument answer, a text]"),
        (ToolCall("python", {"code": "1"}), "[unknown tool python; the tools are bash and submit]"),
    ],
)
async def test_a_call_that_cannot_be_carried_out_is_told(env: TerminalEnv, call: ToolCall, said: str) -> None:
    step = await env.step(call)
    assert not step.done and not step.submitted
    assert step.messages == (Message("tool", (Part(said, SAID),), tool=call.tool),)


async def test_setup_runs_in_the_workdir_with_the_variables(backend: SandboxBackend) -> None:
    task = task_of(
        'echo "$WHO $(pwd) $(cat made)" > /tmp/seen; [ "$(cat /tmp/seen)" = "it\'s me /srv/app it\'s me /srv/app" ]\n'
        "echo $((1 - $?)) > /logs/verifier/reward.txt\n",
        setup=('echo "$WHO $(pwd)" > made', "cat <<'E' >> list\n$x\nE\n[ -s made ]"),
        env={"WHO": "it's me"},
        workdir="/srv/app",
    )
    async with open_terminal_env(task, backend, CONFIG) as env:
        await env.reset()
        assert await parts_of(env, "pwd; echo $WHO; cat made list") == [
            ("/srv/app\nit's me\nit's me /srv/app\n$x\n", OUT)
        ]
        await parts_of(env, "cd /; export WHO=you")
        assert await env.score() == 1.0


async def test_a_setup_command_that_fails_breaks_the_world(backend: SandboxBackend) -> None:
    task = task_of(RIGHT_ANSWER, setup=("true", "echo why; false; true"))
    async with open_terminal_env(task, backend, CONFIG) as env:
        with pytest.raises(SandboxError, match=r"setup command 1 of task 't' exited 1(.|\n)*why"):
            await env.reset()


async def test_a_task_without_tests_is_refused(backend: SandboxBackend) -> None:
    with pytest.raises(TaskError, match=r"no tests/test\.sh"):
        async with open_terminal_env(task_of("", tests={"other": SandboxFile(b"")}), backend, CONFIG):
            pass


async def test_a_task_that_is_for_the_world_model_only_is_not_scored(backend: SandboxBackend) -> None:
    task = task_of("", tests={}, metadata={"world_model_only": True})
    async with open_terminal_env(task, backend, CONFIG) as env:
        await env.reset()
        assert await env.score() is None


def reward_of(json_text: str | None = None, text: str | None = None) -> str:
    lines = [
        f"printf '%s' '{content}' > /logs/verifier/{name}"
        for name, content in (("reward.json", json_text), ("reward.txt", text))
        if content is not None
    ]
    return "\n".join([*lines, "exit 1"])


@pytest.mark.parametrize(
    ("test", "reward"),
    [
        (reward_of(text="1"), 1.0),
        (reward_of(text=" -0.25\n"), -0.25),
        (reward_of("0.5"), 0.5),
        (reward_of('{"reward": 0.5, "style": 1}'), 0.5),
        (reward_of('{"right": 1, "style": 0.5}'), 0.75),
        (reward_of('{"reward": 1}', text="0"), 1.0),
    ],
)
async def test_rewards(backend: SandboxBackend, test: str, reward: float) -> None:
    async with open_terminal_env(task_of(test), backend, CONFIG) as env:
        await env.reset()
        assert await env.score() == reward


@pytest.mark.parametrize(
    ("fields", "metrics"),
    [
        ('"some_flag": false, "another": true', {"verifier/some_flag": 0.0, "verifier/another": 1.0}),
        ('"style": 0.25, "notes": "fine", "list": [1]', {"verifier/style": 0.25}),
    ],
)
async def test_what_stands_beside_the_reward_is_kept_as_metrics(
    backend: SandboxBackend, fields: str, metrics: Mapping[str, float]
) -> None:
    task = task_of(reward_of(f'{{"reward": 1.0, {fields}}}'))
    async with open_terminal_env(task, backend, CONFIG) as env:
        await env.reset()
        assert await env.score() == 1.0 and env.metrics == metrics


async def test_only_the_harness_own_places_are_emptied_before_the_tests(backend: SandboxBackend) -> None:
    """A task may ask for files in /solution, where Harbor puts a task's own solution: nothing else is cleared."""
    left = "/solution/answer.txt /logs/mine /app/a /root/b"
    task = task_of(f"cat {left} > /tmp/seen && echo $(grep -c 42 /tmp/seen) > /logs/verifier/reward.txt")
    task = replace(task, solution={"solve.sh": SandboxFile(b"true")})
    async with open_terminal_env(task, backend, CONFIG) as env:
        await env.reset()
        await parts_of(env, f"mkdir -p /solution; for f in {left}; do echo 42 > $f; done")
        assert await env.score() == 4.0


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("echo why; exit 1", r"wrote neither(.|\n)*why"),
        ("syntax error (", "wrote neither"),
        (reward_of(text=""), "left nothing in reward.txt"),
        (reward_of(text="nan"), "'nan' in reward.txt"),
        (reward_of(text="passed"), "'passed' in reward.txt"),
        (reward_of("", text="1"), "left nothing in reward.json"),
        (reward_of("NaN"), "reward.json"),
        (reward_of('{"reward": "1"}'), "reward.json"),
        (reward_of('{"reward": true}'), "reward.json"),
        (reward_of('{"reward": 1, "other": Infinity}'), "reward.json"),
        (reward_of('{"reward": {"deep": 1}}'), "reward.json"),
        (reward_of('{"style": 1.0, "flag": false}'), "reward.json"),
        (reward_of('{"style": 1.0, "notes": "fine"}'), "reward.json"),
        (reward_of("{}"), "reward.json"),
        (reward_of("[1]"), "reward.json"),
        ("echo 1 > /logs/verifier/reward.txt; sleep 60", "did not end within 1 s"),
    ],
)
async def test_a_test_that_leaves_no_reward_is_no_zero(backend: SandboxBackend, test: str, reason: str) -> None:
    async with open_terminal_env(task_of(test, verifier_timeout_s=1.0), backend, CONFIG) as env:
        await env.reset()
        with pytest.raises(VerifierError, match=reason):
            await env.score()


LIBRARY = """\
cat > /tmp/x.c <<'E'
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) void f(void) {
  FILE *r = fopen("/logs/verifier/reward.txt", "w"); if (r) { fputs("1", r); fclose(r); _Exit(0); } }
E
gcc -shared -fPIC -o /tmp/x.so /tmp/x.c
"""


@pytest.mark.parametrize(
    "attack",
    [
        "mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; echo 1 > /logs/verifier/reward.json",
        "mkdir -p /logs/agent; echo 2 > /logs/agent/answer.txt",
        "mkdir -p /logs/agent/answer.txt /logs/verifier/reward.txt; chmod 500 /logs/verifier /logs/agent",
        "mkdir -p /fake/agent; echo 2 > /fake/agent/answer.txt; rm -rf /logs; ln -s /fake /logs",
        "rm -rf /logs; echo > /logs",
        "mkdir -p /mine; ln -s /mine /tests; ln -s /mine /logs",
        "mkdir -p /tests; echo 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh; chmod 500 /tests",
        "mkdir -p /tests/deep/er; touch /tests/deep/er/x; chmod -R 000 /tests/deep",
        "(while :; do mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt; done) > /dev/null 2>&1 &",
        "(setsid nohup bash -c 'while :; do echo 2 > /logs/agent/answer.txt; done' > /dev/null 2>&1 &)",
        "echo 'echo 1 > /logs/verifier/reward.txt; exit' > /tmp/rc; export BASH_ENV=/tmp/rc ENV=/tmp/rc",
        "for f in ~/.bashrc ~/.bash_profile ~/.profile /etc/profile /etc/bash.bashrc; do "
        "echo 'echo 1 > /logs/verifier/reward.txt; exit' > $f; done",
        "mkdir -p ~/bin; printf '#!/bin/bash\\necho 2\\n' > ~/bin/cat; chmod +x ~/bin/cat; export PATH=~/bin:$PATH",
        "cat() { echo 2; }; export -f cat; alias cat='echo 2'",
        LIBRARY + "export LD_PRELOAD=/tmp/x.so",
        LIBRARY + "echo /tmp/x.so > /etc/ld.so.preload",
        "mv /bin /bin2; mkdir /bin; printf '#!/usr/bin/bash\\necho 1 > /logs/verifier/reward.txt' > /bin/bash; "
        "chmod +x /bin/bash",
        "mv /lib64 /lib65; mkdir /lib64; cp /lib65/* /lib64/",
        "cp /usr/bin/bash /tmp/b; echo x > /usr/bin/cat; rm -f /usr/bin/cat",
        "ulimit -f 0; umask 777; set -e; exec > /dev/null",
        "exit 7",
        "kill -9 $$",
        "chmod 000 /srv /var /tests /logs",
        "chmod 000 /",
        "chmod 333 / /etc; chmod 000 /home /tmp /run /var /dev/shm",
        "(while :; do chmod 000 /; chmod 755 /; done) & sleep 0.2",
        "for d in / /tests ~; do echo 'import os; os._exit(0)' | tee $d/conftest.py $d/pytest.py; done",
        ":(){ :|:& }; :",
    ],
    ids=lambda attack: attack[-40:],
)
async def test_nothing_that_the_agent_prepares_makes_the_reward(backend: SandboxBackend, attack: str) -> None:
    async with open_terminal_env(task_of(RIGHT_ANSWER), backend, CONFIG) as env:
        await env.reset()
        await env.step(bash(attack))
        assert await env.score() == 0.0


async def test_python_tests_do_not_run_what_the_agent_left(backend: SandboxBackend) -> None:
    plant = (
        "d=$(python3 -c 'import site; print(site.getusersitepackages())'); mkdir -p $d; "
        "for f in sitecustomize usercustomize; do echo 'import os; os.write(1, b\"1\"); os._exit(0)' > $d/$f.py; done"
    )
    task = task_of("python3 -c 'print(0)' > /logs/verifier/reward.txt")
    async with open_terminal_env(task, backend, CONFIG) as env:
        await env.reset()
        await parts_of(env, plant)
        if await parts_of(env, "python3 -c 'print(0)'") != [("1", OUT)]:
            pytest.skip("this Python runs nothing from a home folder")
        assert await env.score() == 0.0


async def test_tests_and_solution_are_not_there_before_scoring(backend: SandboxBackend) -> None:
    task = task_of("ls /tests /solution > /tmp/seen 2>&1\n" + RIGHT_ANSWER, solution={"solve.sh": SandboxFile(b"")})
    async with open_terminal_env(task, backend, CONFIG) as env:
        await env.reset()
        assert await parts_of(env, "find /tests /solution /logs -type f 2>/dev/null | wc -l") == [("0\n", OUT)]
        await env.step(submit("2"))
        assert await env.score() == 1.0


async def test_nothing_is_cleared_where_commands_see_another_tree(backend: SandboxBackend) -> None:
    async with backend.open(CONFIG.sandbox) as sandbox:
        await sandbox.put({"/tests/mine": SandboxFile(b"kept")})
        result = await sandbox.exec(_test_command(task_of("true"), "/.not-there", answered=True), timeout_s=10.0)
        assert "another tree" in result.output
        assert await sandbox.get("/tests/mine") == b"kept"


async def test_no_step_after_the_answer(env: TerminalEnv) -> None:
    await env.step(submit("2"))
    with pytest.raises(RuntimeError, match="was submitted"):
        await env.step(bash("true"))


class Counting:
    """The real sandbox, with the calls written down."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.calls: list[str] = []

    async def exec(
        self, command: str, *, timeout_s: float, env: Mapping[str, str] | None = None, cwd: str | None = None
    ) -> ExecResult:
        self.calls.append("exec")
        return await self.sandbox.exec(command, timeout_s=timeout_s, env=env or {}, cwd=cwd)

    async def put(self, files: Mapping[str, SandboxFile]) -> None:
        self.calls.append("put")
        await self.sandbox.put(files)

    async def get(self, path: str, *, max_bytes: int = 1 << 20) -> bytes | None:
        self.calls.append("get")
        return await self.sandbox.get(path, max_bytes=max_bytes)

    async def restart(self) -> None:
        self.calls.append("restart")
        await self.sandbox.restart()


async def test_a_triage_task_costs_few_calls_and_its_solution_earns_the_reward(backend: SandboxBackend) -> None:
    task = triage_task(seed=3, level=1)
    async with backend.open(CONFIG.sandbox) as sandbox:
        counting = Counting(sandbox)
        env = TerminalEnv(task, counting, CONFIG)
        await env.reset()
        assert counting.calls == ["put", "exec"]  # the exec dates the folders
        counting.calls.clear()
        await env.step(submit(str(task.metadata["answer"])))
        assert await env.score() == 1.0
        assert counting.calls == ["restart", "put", "exec", "get", "get"]


async def test_what_ls_tells_of_a_dated_task_is_the_same_on_every_day(backend: SandboxBackend) -> None:
    """Or no run could be repeated: the agent's home is made when the sandbox is, whether files lie in it or not."""
    files = {
        "/etc/svc/a.conf": SandboxFile(b"x", mtime=1_704_067_200),
        "/srv/b": SandboxFile(b"y", mtime=1_704_070_800),
    }
    async with open_terminal_env(task_of(RIGHT_ANSWER, files=files), backend, CONFIG) as env:
        await env.reset()
        said = await parts_of(env, "stat -c %Y /home /home/agent /etc/svc /srv /etc/svc/a.conf")
        assert said == [("1704070800\n" * 4 + "1704067200\n", OUT)]


async def test_of_a_progress_bar_the_last_frame_is_read_and_raw_keeps_them_all(backend: SandboxBackend) -> None:
    bar = "for i in 1 2 3; do printf '\\r%d%%' $i; done; echo; printf 'a\\tb \\033[31mred\\033[0m\\n'"
    for output, said in (("shown", "3%\na\tb red\n"), ("raw", "\r1%\r2%\r3%\na\tb \x1b[31mred\x1b[0m\n")):
        config = replace(CONFIG, output=output)
        async with open_terminal_env(task_of(RIGHT_ANSWER), backend, config) as env:
            await env.reset()
            assert await parts_of(env, bar) == [(said, OUT)]
            frames = "for i in {1..99}; do printf '\\rframe %03d' $i; done"  # 99 x 10 characters, of which 100 may stay
            parts = await parts_of(env, frames)
            assert parts[0] == ("frame 099", OUT) if output == "shown" else parts[1][1] is SAID
    with pytest.raises(ConfigError, match="output='cooked' is no choice; use one of shown, raw"):
        replace(CONFIG, output="cooked")


async def test_a_shell_that_ended_says_what_is_lost(env: TerminalEnv, backend: SandboxBackend) -> None:
    await parts_of(env, "set -euo pipefail")
    await parts_of(env, "f() { echo function; }; x=kept; export Y=exported; cd /srv")
    assert await parts_of(env, "grep nothing-like-this /etc/passwd") == [(f"[exit code 1]\n{NEW_SHELL}", SAID)]
    assert await parts_of(env, 'pwd; echo "$Y ${x-lost}"') == [("/srv\nexported lost\n", OUT)]
    assert await parts_of(env, "echo bye; exit 0") == [("bye\n", OUT), (NEW_SHELL, SAID)]
    assert await parts_of(env, "(exit 3)") == [("[exit code 3]", SAID)]  # a shell of its own
    async with open_terminal_env(task_of(RIGHT_ANSWER), backend, replace(CONFIG, command_timeout_s=0.5)) as env:
        await env.reset()
        stopped = "[timed out after 0.5 s; the command was stopped]"
        assert await parts_of(env, "sleep 5") == [(f"{stopped}\n{NEW_SHELL}", SAID)]
