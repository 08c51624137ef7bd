"""Captured episodes: real shells, a real server that speaks the chat protocol, and a policy that samples behind one."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from backtalk.capture.endpoint import Endpoint, EndpointConfig
from backtalk.capture.people import Script, read_action, read_script
from backtalk.capture.rollout import Author, Left, Reply, Seen, capture_episode
from backtalk.cli import app
from backtalk.envs.base import Step
from backtalk.envs.terminal import BASH, SUBMIT
from backtalk.errors import ConfigError, DataError, SamplerError
from backtalk.evidence.account.report import account_of
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.language.tool_formats import ToolFormat
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.rollout.limits import RolloutLimits
from backtalk.run.log import lock_file, read_trajectories
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole, Trajectory
from sandbox_help import backend_or_skip
from tiny import tiny_tokenizer

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
EPISODES = Path(__file__).parents[2] / "examples" / "episodes"
TASK = Task(id="count", instruction="How many?")
LIMITS = RolloutLimits(max_turns=4)
ADD = ToolSpec("add", "Add.", {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}})
LOOK = ToolSpec("look", "Look.", {"type": "object", "properties": {}})
runner = CliRunner()


@cache
def renderer(tool_format: ToolFormat | None = None) -> Renderer:
    return Renderer(tiny_tokenizer(), (BASH, SUBMIT), RendererConfig(tool_format=tool_format))


class Counter:
    """A world of bash and submit that counts its steps, and breaks at a command that says so."""

    tools = (BASH, SUBMIT)

    def __init__(self) -> None:
        self.steps = 0

    async def __aenter__(self) -> Counter:
        return self

    async def __aexit__(self, *details: object) -> None:
        return None

    async def reset(self) -> tuple[Message, ...]:
        return (Message("system", (Part("Count.", CONTEXT),)), Message("user", (Part("How many?", CONTEXT),)))

    async def step(self, call: ToolCall) -> Step:
        self.steps += 1
        if call.tool == "submit":
            return Step((), done=True, submitted=True)
        text = f"step {self.steps}: {call.arguments['command']}"
        return Step((Message("tool", (Part("[note]\n", WARNING), Part(text, ENV)), call.tool),))

    async def score(self) -> float | None:
        return float(self.steps)


async def played(author: Author, tool_format: ToolFormat | None = None, **limits: int) -> Trajectory:
    return await capture_episode(TASK, lambda task: Counter(), author, renderer(tool_format), replace(LIMITS, **limits))


# ---------------------------------------------------------------- actions as lines


@pytest.mark.parametrize(
    ("line", "call", "text"),
    [
        ("ls -la", ToolCall("bash", {"command": "ls -la"}), ""),
        ("/usr/bin/env", ToolCall("bash", {"command": "/usr/bin/env"}), ""),
        ("{ echo a; }", ToolCall("bash", {"command": "{ echo a; }"}), ""),
        ("/submit 42", ToolCall("submit", {"answer": "42"}), ""),
        ("/submit", ToolCall("submit", {"answer": ""}), ""),
        ('/bash {"command": "a\\nb"}', ToolCall("bash", {"command": "a\nb"}), ""),
        ('/bash {"no": "argument"}', ToolCall("bash", {"command": '{"no": "argument"}'}), ""),
        ('{"tool": "bash", "arguments": {"command": "ls"}, "text": "so"}', ToolCall("bash", {"command": "ls"}), "so"),
        ('{"text": "hm"}', None, "hm"),
    ],
)
def test_a_line_is_an_action(line: str, call: ToolCall | None, text: str) -> None:
    assert read_action(line, (BASH, SUBMIT)) == Reply(call=call, text=text)


def test_tools_with_other_arguments_are_called_with_an_object() -> None:
    assert read_action('/add {"a": 1, "b": 2}', (ADD, LOOK)).call == ToolCall("add", {"a": 1, "b": 2})
    assert read_action("/look", (ADD, LOOK)).call == ToolCall("look", {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "begin with /add, /look"),
        ("/add 1 2", "add takes a, b; write them as an object"),
        ('{"tool": "add", "argument": {}}', "an action has a tool with arguments"),
        ('{"tool": "add", "arguments": [1]}', "an action has a tool with arguments"),
    ],
)
def test_what_is_no_action_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_action(line, (ADD, LOOK))


def test_a_script_is_its_lines_without_comments(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("# first\n\n  ls\n/submit 1\n")
    assert read_script(tmp_path / "s") == ["ls", "/submit 1"]
    (tmp_path / "s").write_text("# nothing\n")
    with pytest.raises(DataError, match="has no action"):
        read_script(tmp_path / "s")
    with pytest.raises(DataError, match="cannot be read"):
        read_script(tmp_path / "none")


# ---------------------------------------------------------------- what is recorded


async def test_a_scripts_actions_are_unsampled_and_its_observations_are_learned_from() -> None:
    trajectory = await played(Script(["ls", "/submit 1"]))
    assert (trajectory.reward, trajectory.stop_reason) == (2.0, StopReason.SUBMITTED)
    assert (trajectory.num_turns, trajectory.num_unsampled_turns, trajectory.stats["num_turns"]) == (2, 2, 2)
    observed = [s for s in trajectory.segments if s.role is ENV]
    decode = renderer().tokenizer.backend_tokenizer.decode
    assert [(decode(list(s.token_ids)), s.tool) for s in observed] == [("step 1: ls", "bash")]
    written = renderer().encode_action(ToolCall("bash", {"command": "ls"}))
    assert any(s.role is ACTION and s.token_ids == written and s.turn == 0 for s in trajectory.segments)
    whole = account_of(trajectory).whole
    assert whole.unsampled == whole.tokens["action"] > 0


class Quoting:
    """An author that remembers what it was shown."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self.replies, self.heard = list(replies), list[Seen]()

    async def reply(self, seen: Seen) -> Reply:
        self.heard.append(seen)
        return self.replies[len(self.heard) - 1]


async def test_an_author_hears_the_world_and_what_was_wrong_with_its_action() -> None:
    author = Quoting(
        [
            Reply(text="hm"),
            Reply(call=ToolCall("bash", {"command": "ls"})),
            Reply(call=ToolCall("submit", {"answer": ""})),
        ]
    )
    trajectory = await played(author)
    first, second, third = author.heard
    assert first.tools == (BASH, SUBMIT)
    assert [message.text for message in first.messages] == ["Count.", "How many?"]
    (told,) = second.messages  # the parse error, which the environment never saw
    assert {part.role for part in told.parts} == {WARNING} and "bash" in told.text
    assert [message.text for message in third.messages] == ["[note]\nstep 1: ls"]
    assert third.token_ids == trajectory.token_ids[: len(third.token_ids)]
    assert trajectory.stats["unclean_turns"] == 1


async def test_an_author_who_leaves_ends_the_episode() -> None:
    trajectory = await played(Script(["ls"]))
    assert (trajectory.stop_reason, trajectory.reward, trajectory.failure) == (StopReason.MAX_TURNS, None, None)
    assert trajectory.count(ENV) > 0
    assert (await played(Script(["ls"]), max_turns=1)).reward == 1  # ended by its limit, it is scored


async def test_an_author_who_fails_costs_the_episode() -> None:
    class Failing:
        async def reply(self, seen: Seen) -> Reply:
            raise SamplerError("gone")

    trajectory = await played(Failing())
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.FAILED, None)
    assert trajectory.failure is not None and trajectory.failure.phase == "sample"
    assert issubclass(Left, SamplerError)


async def test_an_error_that_is_named_as_leaving_is_none() -> None:
    class Away:
        async def reply(self, seen: Seen) -> Reply:
            raise type("Left", (SamplerError,), {})("the server is gone")

    trajectory = await played(Away())
    assert trajectory.stop_reason is StopReason.FAILED and trajectory.failure is not None

    class Quit:
        async def reply(self, seen: Seen) -> Reply:
            raise type("Bored", (Left,), {})("enough")

    assert ((await played(Quit())).stop_reason, (await played(Quit())).failure) == (StopReason.MAX_TURNS, None)


# ---------------------------------------------------------------- a server


Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]] | None]


@dataclass
class Server:
    """What a chat server was asked, and where it is."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    seen = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.asked.append(body | {"path": self.path})
            seen.keys.append(self.headers.get("Authorization"))
            replied_with = answer(body)
            if replied_with is None:  # as a server that dies
                self.connection.close()
                return
            status, record = replied_with
            content = json.dumps(record).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(BrokenPipeError):
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def config(server: Server, **changes: Any) -> EndpointConfig:
    return EndpointConfig(**{"url": server.url, "model": "m", "first_wait_s": 0.0, "attempts": 3, **changes})


def called(tool: str, arguments: str, number: int = 0, content: str | None = None) -> dict[str, Any]:
    call = {"id": f"c{number}", "type": "function", "function": {"name": tool, "arguments": arguments}}
    return {"choices": [{"message": {"content": content, "tool_calls": [call]}, "finish_reason": "tool_calls"}]}


def scripted(*answers: dict[str, Any]) -> Answer:
    left = iter(answers)
    return lambda body: (200, next(left))


async def test_a_chat_server_plays_by_messages() -> None:
    answers = (
        called("bash", '{"command": "ls"}', 0, "Let me look."),
        called("bash", "{broken", 1),
        called("submit", '{"answer": "2"}', 2),
    )
    with serving(scripted(*answers)) as server:
        trajectory = await played(Endpoint(config(server)))
    assert (trajectory.reward, trajectory.stop_reason) == (2.0, StopReason.SUBMITTED)
    assert (trajectory.num_turns, trajectory.num_unsampled_turns) == (3, 3)  # not sampled as these ids
    first, second, third = (asked["messages"] for asked in server.asked)
    assert [m["role"] for m in first] == ["system", "user"]
    assert [tool["function"]["name"] for tool in server.asked[0]["tools"]] == ["bash", "submit"]
    assert second[2]["tool_calls"][0]["id"] == "c0" and second[2]["content"] == "Let me look."
    assert second[3] == {"role": "tool", "tool_call_id": "c0", "content": "[note]\nstep 1: ls"}
    assert "tool_calls" not in third[4] and "{broken" in third[4]["content"]
    assert third[5]["role"] == "user"  # what answers no call
    assert trajectory.stats["unclean_turns"] == 2  # text before a call, and no call
    assert "Let me look." in trajectory.messages[2]["content"]


def sampling(reply: ToolCall, given: Callable[[list[int]], list[int]] = list) -> Answer:
    """A server that says which ids it was given and which it sampled."""
    ids = list(renderer().encode_action(reply))

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        logprobs = [-0.25] * len(ids)
        if "prompt" in body:
            choice = {"text": "", "token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop"}
            return 200, {"choices": [choice]}
        said = called(reply.tool, json.dumps(reply.arguments))
        content = [{"token": "", "logprob": x} for x in logprobs]
        prompt = given([t for s in PROMPT for t in s.token_ids])
        return 200, {
            "prompt_token_ids": prompt,
            "choices": [{**said["choices"][0], "token_ids": ids, "logprobs": {"content": content}}],
        }

    return answer


PROMPT = renderer().render_prompt(
    [Message("system", (Part("Count.", CONTEXT),)), Message("user", (Part("How many?", CONTEXT),))]
)
DONE = ToolCall("submit", {"answer": "0"})


@pytest.mark.parametrize("tokens", [False, True])
async def test_ids_that_continue_ours_are_kept_with_their_logprobs(tokens: bool) -> None:
    with serving(sampling(DONE)) as server:
        trajectory = await played(Endpoint(config(server, tokens=tokens)))
    (action,) = [s for s in trajectory.segments if s.role is ACTION]
    assert action.token_ids == renderer().encode_action(DONE)
    assert set(action.logprobs or ()) == {-0.25}
    assert trajectory.num_unsampled_turns == 0
    asked = server.asked[0]
    assert asked["return_token_ids"] is True and asked["temperature"] == 1
    assert asked["path"] == ("/v1/completions" if tokens else "/v1/chat/completions")
    if tokens:
        assert tuple(asked["prompt"]) == tuple(t for s in PROMPT for t in s.token_ids)
        assert asked["stop_token_ids"] == sorted(renderer().stop_token_ids)


async def test_ids_after_another_prompt_or_at_another_temperature_are_not_sampled() -> None:
    with serving(sampling(DONE, given=lambda ids: ids[1:])) as server:
        assert not any(s.is_sampled for s in (await played(Endpoint(config(server)))).segments)
    with serving(sampling(DONE)) as server:
        assert not any(s.is_sampled for s in (await played(Endpoint(config(server, temperature=0.5)))).segments)


async def test_a_server_that_gives_no_ids_cannot_be_asked_with_tokens() -> None:
    plain = {"choices": [{"text": "ls", "finish_reason": "stop", "logprobs": None}]}
    with serving(scripted(plain)) as server:
        trajectory = await played(Endpoint(config(server, tokens=True)))
    assert trajectory.failure is not None and "has to know return_token_ids" in trajectory.failure.message
    with pytest.raises(ConfigError, match="before or after the temperature"):
        EndpointConfig(url="http://x/v1", model="m", tokens=True, temperature=0.7)


async def test_our_own_server_says_what_it_sampled_in_every_turn() -> None:
    pytest.importorskip("uvicorn", reason="pip install 'backtalk[serve]'")
    from backtalk.rollout.sampler import SamplingParams, ScriptedSampler
    from backtalk.run.serve import Endpoint as Served
    from backtalk.run.serve import listen, serve

    commands = (ToolCall("bash", {"command": "ls"}), ToolCall("bash", {"command": "pwd"}), DONE)
    written = {str(turn): renderer().encode_action(call) for turn, call in enumerate(commands)}
    # It opens a session for each request, and numbers them.
    policy = ScriptedSampler(lambda key: [key.removeprefix("serve/")], written.__getitem__, logprob=-0.5)
    served = Served(renderer(), lambda params: policy, SamplingParams(max_tokens=64), max_tokens=2048)
    with listen("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(serve(served, listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        trajectory = await played(Endpoint(EndpointConfig(url=url, model="m", attempts=12, first_wait_s=0.01)))
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert [s.token_ids for s in trajectory.segments if s.role is ACTION] == [*written.values()]
    assert (trajectory.reward, trajectory.num_unsampled_turns) == (3.0, 0)


async def test_a_reply_that_was_cut_ends_without_an_end() -> None:
    cut = {"choices": [{"message": {"content": "I think that"}, "finish_reason": "length"}]}
    with serving(scripted(cut)) as server:
        trajectory = await played(Endpoint(config(server)), max_turns=1)
    text = renderer().encode_text("I think that")[:-1]
    assert any(s.token_ids == text for s in trajectory.segments)


async def test_a_server_that_refuses_our_extras_is_asked_plainly() -> None:
    """As OpenAI does: 400 for parameters that it does not know, and later for max_tokens."""

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "return_token_ids" in body or "max_tokens" in body:
            return 400, {"error": {"message": "Unrecognized request argument"}}
        return 200, called("submit", '{"answer": ""}')

    with serving(answer) as server:
        trajectory = await played(Endpoint(config(server)))
    assert trajectory.reward == 1
    assert ["return_token_ids" in asked for asked in server.asked] == [True, False, False]
    assert "max_completion_tokens" in server.asked[2]


async def test_a_busy_server_is_asked_again_and_a_dead_one_costs_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKTALK_API_KEY", "secret")
    left = iter([(429, {}), (503, {}), (200, called("submit", '{"answer": ""}'))])
    with serving(lambda body: next(left)) as server:
        trajectory = await played(Endpoint(config(server)))
    assert (trajectory.reward, server.keys) == (1, ["Bearer secret"] * 3)
    gone = await played(Endpoint(config(server, attempts=2)))
    assert gone.failure is not None and gone.reward is None
    assert "did not answer after 2 attempts (ConnectError" in gone.failure.message
    with serving(lambda body: (401, {"error": "no"})) as server:
        denied = await played(Endpoint(config(server)))
    assert len(server.asked) == 1 and denied.failure is not None
    assert "BACKTALK_API_KEY" in denied.failure.message and "secret" not in denied.failure.message
    with serving(lambda body: (200, {"hello": 1})) as server:
        strange = await played(Endpoint(config(server)))
    assert strange.failure is not None and "without a choice" in strange.failure.message


def replied(**message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "stop"}]}


def calling(call: Any) -> dict[str, Any]:
    return replied(content=None, tool_calls=call)


LS = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
NO_CALL = "no tool call"
DEEP = '{"command": ' + "[" * 200 + "]" * 200 + "}"


ODD_REPLIES: list[tuple[dict[str, Any], str]] = [
    (called("submit", '{"answer": 42}'), "'answer' of submit has to be a string, got the number 42"),
    (called("submit", '{"answer": ["4", "2"]}'), "'answer' of submit has to be a string, got an array of 2"),
    (called("bash", '{"command": null}'), "'command' of bash has to be a string, got null"),
    (called("bash", "{}"), "bash needs the argument 'command', got none"),
    (called("bash", ""), "bash needs the argument 'command', got none"),
    (called("fly", '{"to": "moon"}'), "there is no tool 'fly'"),
    (called("bash", "{broken"), NO_CALL),
    (called("bash", '{"command": "ls"} and more'), NO_CALL),
    (called("bash", '["ls"]'), NO_CALL),
    (called("bash", '{"command": NaN}'), NO_CALL),
    (called("bash", DEEP), NO_CALL),
    (calling([LS | {"function": {"name": "bash", "arguments": ["ls"]}}]), NO_CALL),
    (calling([LS | {"function": {"arguments": "{}"}}]), NO_CALL),
    (calling([LS | {"function": None}]), NO_CALL),
    (calling([None]), NO_CALL),
    (calling([17]), NO_CALL),
    (calling("bash"), NO_CALL),
    (replied(content=None), NO_CALL),
    (replied(content=None, refusal="I would rather not."), NO_CALL),
    (replied(content=[THOUGHT, {"type": "text", "text": "ok"}]), NO_CALL),
    (replied(content="a lone \ud800 half <|im_end|> of nothing"), NO_CALL),
    ({"choices": [{"index": 0}]}, NO_CALL),
    ({"choices": [{"message": None, "logprobs": 3, "token_ids": 4, "prompt_token_ids": 5}]}, NO_CALL),
]
HARMLESS_REPLIES = [
    replied(content=[THOUGHT, {"type": "text", "text": ""}], tool_calls=[LS]),
    replied(content=None, refusal=None, reasoning_content="hm", tool_calls=[LS], audio=None),
    calling([{**LS, "function": {**LS["function"], "arguments": {"command": "ls"}}}]),
    calling([{**LS, "id": None}]),
    calling([{"function": LS["function"], "index": 0}, LS]),
    calling(LS),
    {"choices": [*calling([LS])["choices"], replied(content="another")["choices"][0]]},
]


@pytest.mark.parametrize("tool_format", [ToolFormat.HERMES, ToolFormat.TAGS])
async def test_an_odd_reply_is_told_and_the_rollout_goes_on(tool_format: ToolFormat) -> None:
    """One rollout with a turn for each odd reply, and a good one after it that shows that nothing was lost."""
    good = called("bash", '{"command": "ls"}')
    replies = [reply for odd, _ in ODD_REPLIES for reply in (odd, good)]
    with serving(scripted(*replies, called("submit", '{"answer": "2"}', 1))) as server:
        trajectory = await played(Endpoint(config(server)), tool_format, max_turns=len(replies) + 1, max_tokens=100_000)
    n = len(ODD_REPLIES)
    assert (trajectory.failure, trajectory.reward, trajectory.stop_reason) == (None, n + 1, StopReason.SUBMITTED)
    assert (trajectory.num_turns, trajectory.stats["unclean_turns"]) == (2 * n + 1, n)
    answers = [[m["content"] for m in part] for part in answers_by_turn(trajectory)]
    for number, (odd, told) in enumerate(ODD_REPLIES):
        heard = server.asked[2 * number + 1]["messages"][-1]["content"]
        (warned,) = answers[2 * number]
        assert told in heard and warned.startswith("[") and warned in heard, odd
        assert answers[2 * number + 1] == [f"[note]\nstep {number + 1}: ls"], odd
        turn = [s for s in trajectory.segments if s.turn == 2 * number and s.role in (CONTEXT, ACTION)]
        ends = [t in renderer().stop_token_ids for s in turn for t in s.token_ids]
        assert ends == [False] * (len(ends) - 1) + [True], odd


def answers_by_turn(trajectory: Trajectory) -> list[list[Any]]:
    turns: list[list[Any]] = []
    for message in trajectory.messages:
        if message["role"] == "assistant":
            turns.append([])
        elif turns:
            turns[-1].append(message)
    return turns


async def test_what_is_only_written_otherwise_is_a_call() -> None:
    done = called("submit", '{"answer": "1"}', 1)
    with serving(scripted(*HARMLESS_REPLIES, done)) as server:
        trajectory = await played(Endpoint(config(server)), max_turns=len(HARMLESS_REPLIES) + 1)
    assert (trajectory.reward, trajectory.stats["unclean_turns"]) == (len(HARMLESS_REPLIES) + 1, 0)
    for reply, asked in zip(HARMLESS_REPLIES, server.asked[1:], strict=True):
        assistant, tool = asked["messages"][-2:]
        assert assistant["tool_calls"][0]["function"] == LS["function"], reply
        assert (tool["role"], tool["tool_call_id"]) == ("tool", assistant["tool_calls"][0]["id"]), reply


BROKEN_REPLIES: list[tuple[int, dict[str, Any]] | None] = [
    (200, {"choices": []}),
    (200, {"choices": {"0": {}}}),
    (200, {"choices": [None]}),
    (200, {"error": {"message": "overloaded", "code": 502}}),
    (200, replied(content=7)),
    (200, replied(content=[{"type": "image_url", "image_url": {}}])),
    (500, {"error": "out of memory"}),
    None,  # the connection is cut
]


async def test_a_broken_reply_costs_one_rollout() -> None:
    good = (200, called("submit", '{"answer": ""}'))
    for broken in BROKEN_REPLIES:
        asked_once = broken is not None and broken[0] == 200  # which is no reason to ask again
        left = iter([good, *[broken] * (1 if asked_once else 2), good])
        with serving(lambda body, left=left: next(left)) as server:
            first, failed, last = [await played(Endpoint(config(server, attempts=2))) for _ in range(3)]
        assert (first.reward, last.reward, next(left, "none left")) == (1, 1, "none left"), broken
        assert failed.failure is not None, broken
        assert (failed.failure.phase, failed.failure.error) == ("sample", "SamplerError"), broken


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("suffix", [".jsonl", pytest.param(".parquet", marks=pytest.mark.slow)])
def test_a_rollout_is_in_the_file_when_it_ends(tmp_path: Path, suffix: str) -> None:
    """Readable while the third is played; Ctrl-C then costs only that one."""
    backend_or_skip()
    out, asked, go = tmp_path / f"o{suffix}", threading.Event(), threading.Event()
    left = iter([called("bash", '{"command": "pwd"}'), called("submit", '{"answer": "1"}', 1)] * 2)

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        reply = next(left, None)
        if reply is None:
            asked.set()
            go.wait(60)
        return 200, reply or {}

    with serving(answer) as server:
        where = ["--endpoint", server.url, "--model", "m", "--episodes", "3", "--out", str(out)]
        command = [sys.executable, "-m", "backtalk.cli", "capture", "terminal", "--task", "triage", *where]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert asked.wait(120)
            assert [t.sample_index for t in read_trajectories(out)] == [0, 1]
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        go.set()
    assert (process.returncode, f"Written: 2 of 3 rollouts to {out}" in said) == (130, True), said
    written = read_trajectories(out)
    assert [t.stop_reason for t in written] == [StopReason.SUBMITTED] * 2
    assert all(t.reward is not None and t.count(ENV) for t in written)


def test_a_rollout_that_fails_is_written_between_the_others(tmp_path: Path) -> None:
    backend_or_skip()
    done = called("submit", '{"answer": "1"}')
    with serving(scripted(done, {"choices": []}, done)) as server:
        where = ["--endpoint", server.url, "--model", "m", "--episodes", "3", "--out", str(tmp_path / "o.jsonl")]
        result = invoke("terminal", "--task", "triage", *where)
    assert result.exit_code == 1 and "Written: 3 of 3" in result.output
    assert [t.failure is None for t in read_trajectories(tmp_path / "o.jsonl")] == [True, False, True]


def invoke(*arguments: str, typed: str | None = None) -> Any:
    return runner.invoke(app, ["capture", *arguments], input=typed)


def test_a_person_plays_in_a_real_shell(tmp_path: Path) -> None:
    backend_or_skip()
    out = tmp_path / "mine.jsonl"
    done = invoke("terminal", "--task", "triage", "--human", "--out", str(out), typed="echo a-word\n\n/submit 0\n")
    assert done.exit_code == 0, done.output
    assert "a-word" in done.output.replace("echo a-word", "")
    (trajectory,) = read_trajectories(out)
    assert trajectory.stop_reason is StopReason.SUBMITTED and trajectory.reward is not None
    assert trajectory.num_unsampled_turns == trajectory.num_turns == 2 and trajectory.count(ENV) > 0


def test_a_person_may_leave_and_is_told_what_is_no_action(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="pip install 'backtalk[awm]'")
    out = tmp_path / "left.jsonl"
    done = invoke("awm:shop-ten", "--task", "shop/2", "--human", "--out", str(out), typed="hello\n/view_cart\n")
    assert done.exit_code == 0, done.output
    assert "is no action" in done.output and "no reward, max_turns" in done.output.replace("\n", " ")
    assert read_trajectories(out)[0].count(ENV) > 0


def test_the_examples_are_what_their_scripts_give(tmp_path: Path) -> None:
    """Played anew, each gives the stored tokens again: nothing in them depends on the day."""
    pytest.importorskip("fastapi", reason="pip install 'backtalk[awm]'")
    backend_or_skip()
    for world, task, name in (
        ("terminal", "workbench/log-forensics", "log-forensics"),
        ("awm:shop-ten", "shop/8", "shop"),
    ):
        out = tmp_path / f"{name}.jsonl"
        done = invoke(world, "--task", task, "--script", str(EPISODES / f"{name}.txt"), "--out", str(out))
        assert done.exit_code == 0, done.output
        (stored,), (again,) = read_trajectories(EPISODES / f"{name}.jsonl"), read_trajectories(out)
        assert stored.reward == again.reward == 1
        assert (stored.segments, stored.messages) == (again.segments, again.messages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["terminal", "--task", "triage"], "nothing says who plays"),
        (["terminal", "--task", "triage", "--human", "--endpoint", "http://x"], "nothing says who plays"),
        (["terminal", "--human"], "nothing says what to do"),
        (["terminal", "--task", "workbench/none", "--human"], "is neither 'triage' nor a folder"),
        (["terminal", "--task", "triage", "--human", "--set", "options.x=1"], "is of no terminal"),
        (["moon", "--human"], "no world is called 'moon'"),
        (["awm:shop-ten", "--task", "shop/99", "--human"], "has no task 'shop/99'; it has shop/"),
        (["terminal", "--task", "triage", "--endpoint", "http://x"], "needs the name of a model"),
        (["terminal", "--task", "triage", "--endpoint", "x", "--model", "m"], "is no URL"),
        (["terminal", "--task", "triage", "--human", "--model", "m"], "give --endpoint URL"),
    ],
)
def test_what_cannot_be_captured_is_said(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = invoke(*arguments, "--out", str(tmp_path / "o.jsonl"))
    assert isinstance(done.exception, ConfigError), done.output
    assert message in str(done.exception)


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").write_text("mine")
    asked = ["terminal", "--task", "triage", "--human", "--out"]
    assert "there already" in str(invoke(*asked, str(tmp_path / "o.jsonl")).exception)
    assert "end the name in" in str(invoke(*asked, str(tmp_path / "o.csv")).exception)


def test_a_file_that_is_being_written_is_refused_to_a_second(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with lock_file(out):
        done = invoke("terminal", "--task", "triage", "--human", "--out", str(out), typed="/submit 0\n")
    assert "o.jsonl is being written by process" in str(done.exception)
    assert not out.exists()
