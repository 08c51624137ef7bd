"""Prompts and echoes in recorded terminals: texts whose every character a person assigned, and real recordings."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backtalk.exchange.read.chat import ChatMessage
from backtalk.exchange.read.wrappers import TERMINUS, Wrappers
from backtalk.trajectory import TokenRole
from outside_data import ATIF, needs

TERMINAL = Wrappers(echoes=True)


def world(marked: str, *commands: str, earlier: tuple[str, ...] = ()) -> None:
    """Assert that the world said what stands between « and », and the terminal all the rest."""
    text = marked.replace("«", "").replace("»", "")
    parts = TERMINAL.split(text, commands, earlier)
    assert "".join(part.text for part in parts) == text
    assert [part.text for part in parts if part.role is TokenRole.ENV_OUTPUT] == re.findall(
        "«(.*?)»", marked, re.DOTALL
    )


def wrapped(text: str, width: int) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


def test_a_prompt_and_its_command_are_the_terminals() -> None:
    world("root@a:/srv# ls -a\n«.\nls -a\n»root@a:/srv#\n", "ls -a\n")
    world("(venv) user@box:~/x y$ true\n(venv) user@box:~/x y$ ", "true\n")
    world("[me@box src]$ pwd\n«/home/me/src\n»[me@box src]$", "pwd\n")
    world("bash-5.2$ id -u\n«0\n»bash-5.2$ ", "id -u\n")
    world("$ cat n\n«# a heading\n$ not typed\n»$", "cat n\n")


@pytest.mark.parametrize("width", [24, 33, 80])
def test_a_command_is_found_wherever_the_terminal_breaks_it(width: int) -> None:
    command = "for h in one two three; do echo \"$h:\"; grep -E '^Mem' /home/${h}.txt; done; echo finished"
    world(wrapped(f"user@box:~$ {command}", width) + "\n«one:\nMemTotal: 1 kB\n»user@box:~$", command + "\n")


def test_a_space_that_falls_on_the_break_may_be_gone() -> None:
    world("$ echo one\ntwo three\n«one two three\n»$", "echo one two three\n")


def test_output_without_an_end_of_line_stands_before_the_prompt() -> None:
    world('root@a:/# cat s\n«{"n": 1}»root@a:/# echo x\n«x\ndone»root@a:/#', "cat s\n", "echo x\n")


def test_a_here_document_is_the_agents_and_what_it_wrote_is_the_worlds() -> None:
    typed = "cat > f << 'EOF'\nimport os\n\n\tprint(os)\nEOF\n"
    shown = "$ cat > f << 'EOF'\n> import os\n>\n>         print(os)\n> EOF\n"
    world(f"{shown}$ cat f\n«import os\n\n        print(os)\n»$", typed, "cat f\n")


def test_what_is_typed_ahead_shows_twice() -> None:
    typed = "cat > f << 'EOF'\nalpha = 1\nbeta = 2\nEOF\n"
    echoed = "> alpha = 1\n> beta = 2\n> EOF\n$ "
    world(f"$ cat > f << 'EOF'\nalpha = 1\nbeta = 2\nEOF\n{echoed}", typed)
    world(f"$ cat > f << 'EOF'\npha = 1\nbeta = 2\nEOF\n{echoed}", typed)  # its beginning was not taken up
    world("$ sleep 2; echo hi\nls\n«hi\n»$ ls\n«f\n»$", "sleep 2; echo hi\n", "ls\n")
    world("$ cat run.sh\n«date\nls\n»$ pwd\n«/\n»$ ls\n«f\n»$", "cat run.sh\n", "pwd\n", "ls\n")


def test_a_command_over_which_a_program_wrote_has_no_prompt() -> None:
    world(
        "root@a:/# ./serve &\n«[1] 9\n»root@a:/# « * Serving\n»curl localhost\n«ok\n»",
        "./serve &\n",
        "curl localhost\n",
    )


def test_keys_are_echoed_too() -> None:
    world("$ sleep 9\n^C\n$", "sleep 9\n", "C-c")


def test_a_screen_may_still_show_what_other_turns_typed() -> None:
    before = ("cat > f << EOF\n# a\n\n# b\nEOF\n", "ls\n")
    world(
        "> # a\n>\n> # b\n> EOF\n$ ls\n«f\n»$ pwd\n«/\n»$",
        "pwd\n",
        earlier=("cat > f << EOF\n# a\n\n# b\nEOF\n", "ls\n"),
    )
    world("$ diff f g\n«1,2d0\n> # a\n> # b\n»$", "diff f g\n", earlier=before)


def test_a_screen_taken_while_a_line_was_typed_ends_in_it() -> None:
    world("$ cat > f << EOF\n> first li", "cat > f << EOF\nfirst line\nEOF\n")


def test_keystrokes_in_an_agents_json_are_what_it_typed() -> None:
    text = json.dumps({"analysis": "x", "commands": [{"keystrokes": 'echo "é"\n', "duration": 1}]})
    assert ChatMessage(role="assistant", text=text).commands == ('echo "é"\n',)


@given(st.text("ab \n$>#\t", max_size=40), st.lists(st.text("ab \n\t", max_size=8), max_size=4))
@settings(deadline=None)
def test_no_text_is_lost(text: str, commands: list[str]) -> None:
    assert "".join(part.text for part in TERMINAL.split(text, commands, commands)) == text


def rows_that_echo(text: str, commands: list[str]) -> bytearray:
    """Mark the echoes that stand behind a prompt by another way: row by row, joined until a typed line is complete."""
    marks, typed = bytearray(len(text)), [x.rstrip() for command in commands for x in command.split("\n") if x.strip()]
    rows = [(match.start(), match[0]) for match in re.finditer("[^\n]+", text)]
    for i, (start, row) in enumerate(rows):
        for prompt in re.finditer(r"(?:[#$>]|\.\.\.) ", row):
            said, spans = row[prompt.end() :], [(start + prompt.end(), start + len(row))]
            for following, more in [*rows[i + 1 :], (0, "")]:
                line = next((x for x in typed if "".join(x.split()) == "".join(said.split())), None)
                if line is not None and said:
                    del typed[: typed.index(line) + 1]
                    for begin, end in spans:
                        marks[begin:end] = b"\1" * (end - begin)
                    break
                if not said or not any("".join(x.split()).startswith("".join(said.split())) for x in typed):
                    break
                said, spans = said + more, [*spans, (following, following + len(more))]
            else:
                continue
            if marks[start + len(row) - 1]:
                break
    return marks


@needs(ATIF)
def test_no_echo_of_a_real_terminal_is_environment_output() -> None:
    told = echoes = left = prompts = 0
    with gzip.open(ATIF, "rt") as file:
        trajectories = [json.loads(line)["trajectory"] for line in file]
    for trajectory in trajectories:
        earlier: list[str] = []
        for step in trajectory["steps"]:
            commands = [call["arguments"].get("keystrokes", "") for call in step.get("tool_calls") or ()]
            for result in (step.get("observation") or {}).get("results", ()):
                text, at = result["content"], 0
                marks = rows_that_echo(text, commands)
                echoes += sum(marks)
                for part in TERMINUS.split(text, commands, earlier):
                    if part.role is TokenRole.ENV_OUTPUT:
                        told += len(part.text)
                        left += sum(marks[at : at + len(part.text)])
                        prompts += sum(map(len, re.findall(r"^[\w.-]+@[\w.-]+:[^\n#$]*[#$](?= |$)", part.text, re.M)))
                    at += len(part.text)
            earlier += commands
    assert echoes > 150_000
    assert left == 0
    assert prompts < 0.001 * told  # of background jobs that had written over the prompt before
    print(f"{told} ENV_OUTPUT, {left} of {echoes} echoed characters among it, {prompts} of prompts")
