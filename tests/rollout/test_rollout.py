"""Whole attempts with a scripted policy and a small world that can be told to break."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest

from backtalk.envs.base import Env, Step
from backtalk.errors import ConfigError, SamplerError, SandboxError, VerifierError
from backtalk.language.renderer import Renderer, RendererConfig
from backtalk.messages import Message, Part, ToolCall, ToolSpec
from backtalk.rollout import limits as limits_module
from backtalk.rollout import rollout as rollout_module
from backtalk.rollout.groups import Stragglers, fit_concurrency, run_groups
from backtalk.rollout.limits import Deadline, RolloutLimits, backoff_s
from backtalk.rollout.rollout import run_rollout
from backtalk.rollout.sampler import Completion, SamplerSession, ScriptedSampler
from backtalk.sandboxes.base import SandboxLimits
from backtalk.sandboxes.machine import capacity
from backtalk.sandboxes.machine.capacity import Capacity
from backtalk.tasks.task import Task
from backtalk.trajectory import StopReason, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_tokenizer

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
ONE_TEXT = {"type": "object", "properties": {"text": {"type": "string"}}}
TOOLS = (ToolSpec("bash", "Run", ONE_TEXT), ToolSpec("submit", "Answer", ONE_TEXT))
LIMITS = RolloutLimits(max_turns=4, max_tokens=2000, rollout_timeout_s=20, max_retries=0)
TASK = Task(id="t", instruction="Say it back")
SECONDS = ("reset_seconds", "sample_seconds", "env_seconds", "score_seconds")
Hook = Callable[[str], object]


@cache
def renderer(**config: Any) -> Renderer:
    return Renderer(tiny_tokenizer(), TOOLS, RendererConfig(**config))


def scripted(*replies: str) -> ScriptedSampler:
    return ScriptedSampler(replies, renderer().encode_text)


@dataclass
class Echo:
    """A world that says commands back. ``hooks`` run first, by the name of the phase: to break, hang or slow it."""

    hooks: dict[str, Hook] = field(default_factory=dict)
    reward: float | None = 1.0
    events: list[str] = field(default_factory=list)
    tools: tuple[ToolSpec, ...] = TOOLS
    metrics: dict[str, float] = field(default_factory=dict)

    async def _enter(self, phase: str) -> None:
        self.events.append(phase)
        outcome = self.hooks.get(phase, lambda _: None)(phase)
        if asyncio.iscoroutine(outcome):
            await outcome

    async def reset(self) -> tuple[Message, ...]:
        await self._enter("reset")
        return (Message("user", (Part("Say it back", CONTEXT),)),)

    async def step(self, call: ToolCall) -> Step:
        await self._enter("step")
        (said,) = call.arguments.values()
        if call.tool == "submit":
            return Step((), done=True, submitted=True)
        if said == "quit":
            return Step((Message("tool", (Part("bye", ENV),)),), done=True)
        parts = (Part(said, ENV), Part("\n[exit code 1]", WARNING))
        return Step((Message("tool", parts, tool=call.tool),), timed_out=said == "slow", truncated=said == "long")

    async def score(self) -> float | None:
        await self._enter("score")
        return self.reward

    @asynccontextmanager
    async def open(self, task: Task) -> AsyncIterator[Env]:
        await self._enter("open")
        try:
            yield self
        finally:
            await self._enter("close")


def slow(phase: str) -> object:
    return asyncio.sleep(0.02)


def breaks(error: BaseException) -> Hook:
    def hook(phase: str) -> None:
        raise error

    return hook


def hangs(phase: str) -> object:
    return asyncio.sleep(3600)


async def rollout(
    world: Echo, *replies: str, limits: RolloutLimits = LIMITS, sampler: ScriptedSampler | None = None, **config: Any
) -> Trajectory:
    chosen = sampler or scripted(*replies)
    return await run_rollout(TASK, world.open, chosen, renderer(**config), limits, sample_index=3, key="k")


async def run_group(task: Task, *args: Any, **kwargs: Any) -> TrajectoryGroup:
    (group,) = await run_groups([task], *args, **kwargs)
    return group


def text_of(trajectory: Trajectory, role: TokenRole) -> list[str]:
    backend = renderer().tokenizer.backend_tokenizer
    return [backend.decode(list(s.token_ids), skip_special_tokens=False) for s in trajectory.segments if s.role is role]


# --- the ways an attempt ends ---


async def test_a_whole_attempt() -> None:
    world = Echo(reward=0.5)
    t = await rollout(world, "<bash>hello</bash>", "hm", "<bash>slow</bash>", "<submit>42</submit>")
    assert (t.task_id, t.sample_index, t.reward, t.stop_reason) == ("t", 3, 0.5, StopReason.SUBMITTED)
    assert t.failure is None
    assert text_of(t, CONTEXT) == ["Say it back"]
    assert text_of(t, ACTION) == [
        "<bash>hello</bash><|im_end|>",
        "hm<|im_end|>",
        "<bash>slow</bash><|im_end|>",
        "<submit>42</submit><|im_end|>",
    ]
    assert text_of(t, ENV) == ["hello", "slow"]
    assert text_of(t, WARNING) == ["\n[exit code 1]", "[no tool call; write <bash>...</bash>]", "\n[exit code 1]"]
    assert [(s.turn, s.tool) for s in t.segments if s.role in (ENV, WARNING)] == [
        (0, "bash"),
        (0, "bash"),
        (1, None),
        (2, "bash"),
        (2, "bash"),
    ]
    assert [m["role"] for m in t.messages] == ["user", *["assistant", "tool"] * 3, "assistant"]
    assert t.messages[2] == {"role": "tool", "content": "hello\n[exit code 1]", "tool": "bash"}
    assert {name: x for name, x in t.stats.items() if name not in SECONDS} == {
        "num_turns": 4,
        "invalid_calls": 1,
        "unclean_turns": 1,
        "role_confusions": 0,
        "cut_after_call": 0,
        "drifts": 0,
        "command_timeouts": 1,
        "truncated_observations": 0,
        "retries": 0,
        "action_tokens": t.count(ACTION),
        "env_output_tokens": t.count(ENV),
    }
    assert all(t.stats[name] >= 0 for name in SECONDS)
    assert world.events == ["open", "reset", "step", "step", "step", "score", "close"]


async def test_the_last_observation_is_kept() -> None:
    t = await rollout(Echo(), "<bash>hello</bash>", limits=RolloutLimits(max_turns=2))
    assert (t.stop_reason, t.reward, t.num_turns) == (StopReason.MAX_TURNS, 1.0, 2)
    assert text_of(t, ENV) == ["hello", "hello"]
    t = await rollout(Echo(), "<bash>quit</bash>")
    assert (t.stop_reason, t.reward) == (StopReason.ENV_DONE, 1.0)
    assert text_of(t, ENV) == ["bye"]


async def test_the_renderer_speaks_of_the_tools_of_the_world_it_is_in() -> None:
    shout = ToolSpec("shout", "Say it", ONE_TEXT)
    call = '<tool_call>{"name": "shout", "arguments": {"text": "hello"}}</tool_call>'
    t = await rollout(Echo(tools=(shout,)), call, limits=RolloutLimits(max_turns=1))
    assert t.stats["invalid_calls"] == 0
    assert text_of(t, ENV) == ["hello"]
    t = await rollout(Echo(tools=(shout,)), "<bash>hello</bash>", limits=RolloutLimits(max_turns=1))
    assert t.stats["invalid_calls"] == 1
    assert text_of(t, ENV) == []


async def test_what_the_verifier_says_beside_the_reward_is_among_the_stats() -> None:
    t = await rollout(Echo(metrics={"verifier/style": 0.25}), "<submit>1</submit>")
    assert (t.reward, t.stats["verifier/style"]) == (1.0, 0.25)


async def test_nobody_scores() -> None:
    t = await rollout(Echo(reward=None), "<submit>1</submit>")
    assert (t.reward, t.failure, t.stop_reason) == (None, None, StopReason.SUBMITTED)


@pytest.mark.parametrize("over", range(0, 60, 4))
async def test_the_token_limit_keeps_what_fits_and_is_scored(over: int) -> None:
    full = await rollout(Echo(), "<bash>a b c d e f g h</bash>", limits=RolloutLimits(max_turns=2))
    limits = RolloutLimits(max_turns=2, max_tokens=len(full) - over)
    t = await rollout(Echo(), "<bash>a b c d e f g h</bash>", limits=limits)
    assert t.token_ids == full.token_ids[: len(full) - over]
    assert t.roles == full.roles[: len(full) - over]
    assert (t.stop_reason, t.reward) == (StopReason.MAX_TOKENS, 1.0)
    seen, sent = ([s for s in x.segments if s.role in (ENV, WARNING)] for x in (t, full))
    answered = {s.turn for s in t.segments if s.role is ACTION and s in full.segments}
    fits = sum(map(len, seen)) == sum(len(s) for s in sent if s.turn in answered)
    assert t.stats["truncated_observations"] == (not fits)
    assert t.stats["invalid_calls"] == 0


async def test_a_prompt_that_fills_the_history_ends_before_the_first_turn() -> None:
    t = await rollout(Echo(), "<submit>1</submit>", limits=RolloutLimits(max_tokens=5))
    assert (t.stop_reason, t.num_turns, t.reward) == (StopReason.MAX_TOKENS, 0, 1.0)


async def test_a_cut_action_is_told_and_its_turn_is_closed_for_it() -> None:
    t = await rollout(Echo(), "<bash>hello hello</bash>", limits=RolloutLimits(max_turns=1, max_tokens_per_turn=3))
    assert t.count(ACTION) == 3
    assert text_of(t, WARNING) == ["[cut at the token limit before </bash>]"]
    after = next(s for s in t.segments if s.turn == 0 and s.role is TEMPLATE)
    assert after.token_ids[0] == renderer().end_of_turn_id


async def test_another_stop_token_than_the_end_of_turn_gets_one_after_it() -> None:
    pad = renderer().pad_token_id
    sampler = ScriptedSampler(["hm"], lambda text: (*renderer().encode_text(text)[:-1], pad))
    t = await rollout(Echo(), sampler=sampler, limits=RolloutLimits(max_turns=1))
    position = t.token_ids.index(pad)
    assert t.token_ids[position + 1] == renderer().end_of_turn_id
    assert t.roles[position : position + 2] == (ACTION, TEMPLATE)


async def test_truncation_by_the_world_is_counted() -> None:
    t = await rollout(Echo(), "<bash>long</bash>", limits=RolloutLimits(max_turns=3))
    assert t.stats["truncated_observations"] == 3


# --- several calls in a turn ---

TWO = "<bash>one</bash><bash>two</bash>"


async def test_calls_are_carried_out_in_order_and_answered_in_one_observation() -> None:
    world = Echo()
    t = await rollout(world, TWO, "<submit>1</submit><bash>late</bash>", max_calls_per_turn=2)
    assert world.events == ["open", "reset", "step", "step", "step", "score", "close"]
    assert (t.stop_reason, t.num_turns) == (StopReason.SUBMITTED, 2)
    assert text_of(t, ENV) == ["one", "two"]
    assert text_of(t, WARNING) == ["\n[exit code 1]", "\n[exit code 1]"]
    assert {(s.turn, s.tool) for s in t.segments if s.role in (ENV, WARNING)} == {(0, "bash")}
    assert [m["role"] for m in t.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert (t.stats["invalid_calls"], t.stats["unclean_turns"]) == (0, 0)


async def test_an_end_ends_the_calls_too() -> None:
    world = Echo()
    t = await rollout(world, "<bash>a</bash><bash>quit</bash><bash>late</bash>", max_calls_per_turn=9)
    assert (t.stop_reason, text_of(t, ENV)) == (StopReason.ENV_DONE, ["a", "bye"])
    assert world.events.count("step") == 2


async def test_calls_that_are_left_out_are_told_in_front_of_the_observation() -> None:
    world = Echo()
    t = await rollout(world, TWO, limits=RolloutLimits(max_turns=1), stop_after_call=False)
    assert world.events.count("step") == 1
    assert text_of(t, ENV) == ["one"]
    first, last = text_of(t, WARNING)
    assert first == "[only the first call was run; write one call in each reply]\n"
    assert last == "\n[exit code 1]"
    roles = [s.role for s in t.segments if s.turn == 0 and s.role in (ENV, WARNING)]
    assert roles == [WARNING, ENV, WARNING]
    assert t.messages[2]["content"] == first + "one\n[exit code 1]"
    assert (t.stats["invalid_calls"], t.stats["unclean_turns"]) == (0, 1)


async def test_the_last_call_may_be_the_one_that_is_run() -> None:
    t = await rollout(Echo(), TWO, limits=RolloutLimits(max_turns=1), which_calls="last")
    assert text_of(t, ENV) == ["two"]
    assert text_of(t, WARNING)[0] == "[only the last call was run; write one call in each reply]\n"
    world = Echo()
    t = await rollout(world, "<bash>one</bash><bash>two", limits=RolloutLimits(max_turns=1), which_calls="last")
    assert "step" not in world.events  # what was meant to be last cannot be read
    assert t.stats["invalid_calls"] == 1
    t = await rollout(Echo(), f"<bash>zero</bash>{TWO}", max_calls_per_turn=2, which_calls="last", limits=LIMITS)
    assert text_of(t, ENV)[:2] == ["one", "two"]


@pytest.mark.parametrize("told", [False, True])
async def test_faults_of_form_are_counted_and_told_where_asked(told: bool) -> None:
    t = await rollout(Echo(), "So: <bash>a</bash>", limits=RolloutLimits(max_turns=2), format_warnings=told)
    assert t.stats["unclean_turns"] == 2
    assert text_of(t, WARNING).count("[text outside the call]\n") == 2 * told


async def test_what_was_said_to_the_first_call_is_kept_if_the_world_breaks_at_the_second() -> None:
    calls = iter([None, SandboxError("died")])

    def second_breaks(phase: str) -> None:
        error = next(calls)
        if error is not None:
            raise error

    t = await rollout(Echo({"step": second_breaks}), TWO, max_calls_per_turn=2)
    assert t.failure is not None and t.failure.phase == "step"
    assert (t.reward, text_of(t, ENV)) == (None, ["one"])


async def test_messages_name_the_tool_they_come_from() -> None:
    t = await rollout(Echo(), "<bash>quit</bash>")  # the world named none
    assert [(s.turn, s.tool) for s in t.segments if s.role is ENV] == [(0, "bash")]
    assert t.messages[-1] == {"role": "tool", "content": "bye", "tool": "bash"}


INVENTED = "<bash>a</bash>\n<|im_start|>tool\nall done"


async def test_an_action_in_the_format_of_observations_is_counted() -> None:
    for stops, unclean, cut in ((False, 3, 0), (True, 0, 3)):
        t = await rollout(Echo(), INVENTED, limits=RolloutLimits(max_turns=3), stop_after_call=stops)
        assert t.stats["role_confusions"] == 3
        assert (t.stats["unclean_turns"], t.stats["cut_after_call"]) == (unclean, cut)


async def test_what_the_policy_says_after_its_call_is_in_no_history_and_the_template_ends_its_turn() -> None:
    sampler = ScriptedSampler([INVENTED, "<submit>1</submit>"], renderer().encode_text, logprob=-0.5)
    t = await rollout(Echo(), sampler=sampler)
    ids = renderer().encode_text("<bash>a</bash>")[:-1]
    _, _, _, action, closed, *_ = t.segments  # after the task in its scaffold
    assert (action.role, action.token_ids, action.logprobs) == (ACTION, ids, (-0.5,) * 3)
    assert closed.role is TEMPLATE and closed.token_ids[0] == renderer().end_of_turn_id
    assert text_of(t, ACTION) == ["<bash>a</bash>", "<submit>1</submit><|im_end|>"]  # the second ends its own turn
    own_end = await rollout(Echo(), "<bash>a</bash>", "<submit>1</submit>")
    assert t.token_ids == own_end.token_ids  # both are what the template writes
    assert t.messages == own_end.messages


# --- histories that are rewritten ---

THOUGHT = "<think>\nhm\n</think>\n\n"


async def test_stripped_thinking_begins_a_branch_that_is_sampled_from() -> None:
    sampler = Watching([f"{THOUGHT}<bash>one</bash>", "<bash>two</bash>", f"{THOUGHT}<bash>three</bash>"], [])
    t = await rollout(Echo(), sampler=sampler, limits=RolloutLimits(max_turns=4), thinking="strip")
    # Turns 0, 2 and 3 (the last reply is said again) thought; turn 1 did not, so its history is extended.
    assert [[s.turn for s in branch if s.role is ACTION] for branch in t.branches] == [[0], [1, 2], [3], []]
    assert (t.stats["drifts"], t.num_turns) == (3, 4)
    assert text_of(t, ENV) == ["one", "two", "three", "three"]
    assert [s.branch for s in t.segments if s.role is ENV] == [1, 1, 2, 3]
    backend = renderer().tokenizer.backend_tokenizer
    tokens = [[token for s in branch for token in s.token_ids] for branch in t.branches]
    texts = [backend.decode(ids, skip_special_tokens=False) for ids in tokens]
    assert texts[1].startswith(
        "<|im_start|>user\nSay it back<|im_end|>\n<|im_start|>assistant\n<bash>one</bash><|im_end|>\n"
        "<|im_start|>tool\none\n[exit code 1]<|im_end|>\n<|im_start|>assistant\n<bash>two</bash><|im_end|>"
    )
    assert [text.count("hm") for text in texts] == [1, 1, 1, 0]  # only where it was just thought
    # The policy was asked to go on from the branch alone, and what a branch takes over is not trained again.
    asked = [list(history) for history, _ in sampler.asked]
    assert [ids in (tokens[b][: len(ids)] for b in range(4)) for ids in asked] == [True] * 4
    assert asked[1] == tokens[1][: len(asked[1])] and asked[3] == tokens[2][: len(asked[3])]
    assert {s.role for s in t.branches[2] if s.turn is None} == {CONTEXT, TEMPLATE}


async def test_the_token_limit_is_of_the_branch() -> None:
    reply = f"{THOUGHT}<bash>one</bash>"
    full = await rollout(Echo(), reply, limits=RolloutLimits(max_turns=2), thinking="strip")
    longest = max(sum(map(len, branch)) for branch in full.branches)
    assert len(full) > longest
    exact = RolloutLimits(max_turns=3, max_tokens=longest)
    t = await rollout(Echo(), reply, limits=exact, thinking="strip")
    assert t.stop_reason is StopReason.MAX_TOKENS
    assert max(sum(map(len, branch)) for branch in t.branches) == longest


async def test_kept_thinking_stays_in_one_branch() -> None:
    t = await rollout(Echo(), f"{THOUGHT}<bash>one</bash>", limits=RolloutLimits(max_turns=3), thinking="keep")
    assert (len(t.branches), t.stats["drifts"], t.stats["unclean_turns"]) == (1, 0, 0)
    t = await rollout(Echo(), "<bash>one</bash>", limits=RolloutLimits(max_turns=1), thinking="keep")
    assert t.stats["unclean_turns"] == 1  # no thinking


# --- the world breaks ---


@pytest.mark.parametrize(
    ("phase", "where", "events", "said"),
    [
        ("open", "reset", ["open"], []),
        ("reset", "reset", ["open", "reset", "close"], []),
        ("step", "step", ["open", "reset", "step", "close"], ["<bash>hello</bash><|im_end|>"]),
    ],
)
async def test_a_broken_sandbox_is_a_failure_without_a_reward(
    phase: str, where: str, events: list[str], said: list[str]
) -> None:
    world = Echo({phase: breaks(SandboxError("the sandbox died"))})
    t = await rollout(world, "<bash>hello</bash>")
    assert (t.stop_reason, t.reward) == (StopReason.FAILED, None)
    assert t.failure is not None
    assert (t.failure.phase, t.failure.error, t.failure.message) == (where, "SandboxError", "the sandbox died")
    assert t.failure.traceback.endswith("SandboxError: the sandbox died\n") and "test_rollout.py" in t.failure.traceback
    assert text_of(t, ACTION) == said
    assert world.events == events


@pytest.mark.parametrize("reward", [math.nan, math.inf, None])
async def test_a_verifier_without_a_number_is_a_failure_that_keeps_the_observations(reward: float | None) -> None:
    hooks = {"score": breaks(VerifierError("no reward file"))} if reward is None else {}
    world = Echo(hooks, reward=reward)
    t = await rollout(world, "<bash>hello</bash>", "<submit>1</submit>")
    assert t.stop_reason is StopReason.FAILED
    assert t.failure is not None
    assert (t.failure.phase, t.failure.error) == ("score", "VerifierError")
    assert text_of(t, ENV) == ["hello"]
    assert world.events[-1] == "close"


async def test_a_world_that_breaks_when_all_is_scored_takes_nothing_away() -> None:
    t = await rollout(Echo({"close": breaks(SandboxError("late"))}), "<submit>1</submit>")
    assert (t.stop_reason, t.reward, t.failure) == (StopReason.SUBMITTED, 1.0, None)


async def test_the_second_of_two_breaks_does_not_hide_where_the_first_was() -> None:
    hooks = {"step": breaks(SandboxError("first")), "close": breaks(SandboxError("second"))}
    t = await rollout(Echo(hooks), "<bash>hello</bash>")
    assert t.failure is not None
    assert t.failure.phase == "step"


async def test_a_broken_sampler_is_a_failure() -> None:
    class Broken(ScriptedSampler):
        def session(self, key: str) -> BrokenSession:  # type: ignore[override]
            return BrokenSession()

    class BrokenSession:
        async def __aenter__(self) -> SamplerSession:
            return self

        async def __aexit__(self, *error: object) -> None:
            return None

        async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
            raise SamplerError("out of memory")

    world = Echo()
    t = await rollout(world, sampler=Broken([""], renderer().encode_text))
    assert t.failure is not None
    assert (t.failure.phase, t.failure.error) == ("sample", "SamplerError")
    assert world.events == ["open", "reset", "close"]


@pytest.mark.parametrize("phase", ["open", "reset", "step", "score", "close"])
@pytest.mark.parametrize("bug", [KeyError("oops"), TimeoutError("its own"), asyncio.CancelledError()])
async def test_a_bug_is_raised_and_the_world_closed(phase: str, bug: BaseException) -> None:
    world = Echo({phase: breaks(bug)})
    with pytest.raises(type(bug)):
        await rollout(world, "<submit>1</submit>")
    assert world.events[-1] == ("open" if phase == "open" else "close")


# --- time ---


@pytest.mark.parametrize("of_task", [False, True])
@pytest.mark.parametrize("phase", ["open", "reset"])
async def test_the_deadline_covers_setting_up(phase: str, of_task: bool) -> None:
    world = Echo({phase: hangs})
    task = replace(TASK, agent_timeout_s=0.2) if of_task else TASK
    limits = RolloutLimits(rollout_timeout_s=3600 if of_task else 0.2)
    policy = scripted("<bash>hello</bash>")
    t = await run_rollout(task, world.open, policy, renderer(), limits, sample_index=0, key="k")
    assert (t.stop_reason, t.reward, t.failure, t.segments) == (StopReason.DEADLINE, None, None, ())
    assert world.events == (["open"] if phase == "open" else ["open", "reset", "close"])


@pytest.mark.parametrize("phase", ["sample", "step"])
async def test_the_deadline_keeps_what_was_said(phase: str) -> None:
    deadline, turns = Deadline(3600), iter(range(9))

    async def hang_in_the_third_turn() -> None:
        if next(turns) == 2:
            deadline.bring_forward(0)
            await asyncio.sleep(3600)

    world = Echo({"step": lambda _: hang_in_the_third_turn()} if phase == "step" else {})
    policy = Watching(["<bash>hello</bash>"], [])
    if phase == "sample":
        policy.first = hang_in_the_third_turn
    t = await run_rollout(TASK, world.open, policy, renderer(), LIMITS, sample_index=0, key="k", deadline=deadline)
    assert (t.stop_reason, t.reward, t.failure) == (StopReason.DEADLINE, None, None)
    assert t.num_turns == (2 if phase == "sample" else 3)
    assert text_of(t, ENV) == ["hello", "hello"]
    assert world.events == ["open", "reset", *["step"] * t.num_turns, "close"]


@pytest.mark.parametrize("what", ["acted", "no action", "not scored", "broken"])
@pytest.mark.parametrize(("worth", "reward"), [("unscored", None), ("verify", 0.25), ("zero", 0.0)])
async def test_what_a_late_rollout_is_worth_is_a_choice(worth: Any, reward: float | None, what: str) -> None:
    world = Echo({"reset" if what == "no action" else "step": hangs}, reward=None if what == "not scored" else 0.25)
    if what == "broken":
        world.hooks["score"] = breaks(VerifierError("no tests"))
    task = replace(TASK, metadata={"world_model_only": what == "not scored"})
    limits = RolloutLimits(rollout_timeout_s=0.3, deadline=worth)
    policy = scripted("<bash>hello</bash>")
    t = await run_rollout(task, world.open, policy, renderer(), limits, sample_index=0, key="k")
    scored = worth == "verify" and what != "no action"
    assert world.events.count("score") == scored
    if what == "broken" and scored:  # an infrastructure failure, which is no 0
        assert (t.stop_reason, t.reward, t.failure and t.failure.phase) == (StopReason.FAILED, None, "score")
        return
    assert (t.stop_reason, t.failure) == (StopReason.DEADLINE, None)
    assert t.reward == (reward if what == "acted" or (what == "broken" and worth == "zero") else None)


def test_a_straggler_is_never_zero() -> None:
    with pytest.raises(ConfigError, match="by the pace of others"):
        RolloutLimits(deadline="zero", straggler_factor=3.0)
    with pytest.raises(ConfigError, match=r"deadline='never' is no choice; use one of unscored, verify, zero"):
        RolloutLimits(deadline="never")  # type: ignore[arg-type]


async def test_a_world_that_does_not_let_itself_be_stopped_ends_at_its_next_turn() -> None:
    async def stubborn() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    world = Echo({"step": lambda _: stubborn()})
    t = await rollout(world, "<bash>hello</bash>", limits=RolloutLimits(rollout_timeout_s=0.1))
    assert (t.stop_reason, t.reward, text_of(t, ENV)) == (StopReason.DEADLINE, None, ["hello"])


@pytest.mark.parametrize("bug", [None, ZeroDivisionError("a bug")])
async def test_a_world_that_does_not_close_is_left_behind(
    bug: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rollout_module, "CLOSE_TIMEOUT_S", 0.1)
    world = Echo({"close": hangs} | ({"step": breaks(bug)} if bug else {}))
    if bug is None:
        t = await rollout(world, "<submit>1</submit>")
        assert (t.stop_reason, t.reward, t.failure) == (StopReason.SUBMITTED, 1.0, None)
    else:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await rollout(world, "<submit>1</submit>")
    assert "an environment did not close within 0.1 s" in caplog.text


async def test_a_world_that_breaks_because_the_deadline_ended_it_is_at_its_deadline() -> None:
    async def interrupted() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise SandboxError("connection lost") from None

    world = Echo({"step": lambda _: interrupted()})
    t = await rollout(world, "<bash>hello</bash>", limits=RolloutLimits(rollout_timeout_s=0.1))
    assert (t.stop_reason, t.failure) == (StopReason.DEADLINE, None)


async def test_scoring_that_hangs_is_a_failure() -> None:
    world = Echo({"score": hangs})
    t = await rollout(world, "<submit>1</submit>", limits=RolloutLimits(rollout_timeout_s=0.1))
    assert t.failure is not None
    assert (t.failure.phase, t.failure.error) == ("score", "VerifierError")


async def test_cancelling_closes_the_world_and_goes_on_up() -> None:
    world = Echo({"step": hangs})
    running = asyncio.create_task(rollout(world, "<bash>hello</bash>"))
    while "step" not in world.events:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert world.events == ["open", "reset", "step", "close"]


# --- worlds that break before anything was said ---


class Unsteady(Echo):
    """A world that breaks in its first ``times`` lives."""

    def breaking(self, phase: str, times: int, error: Exception) -> Unsteady:
        left = [error] * times
        self.hooks[phase] = lambda _: breaks(left.pop())(phase) if left else None
        return self


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait."""
    monkeypatch.setattr(limits_module, "BACKOFF_S", 0.0)


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("phase", ["open", "reset"])
async def test_a_world_that_broke_before_anything_was_said_is_made_again(phase: str) -> None:
    world = Unsteady().breaking(phase, 2, SandboxError("not yet"))
    t = await rollout(world, "<bash>a</bash>", "<submit>1</submit>", limits=RolloutLimits(max_retries=2))
    assert (t.stop_reason, t.reward, t.failure) == (StopReason.SUBMITTED, 1.0, None)
    assert t.stats["retries"] == 2
    assert text_of(t, CONTEXT) == ["Say it back"]  # once: nothing of the lost worlds is in it
    lost = ["open"] if phase == "open" else ["open", "reset", "close"]
    assert world.events == [*lost * 2, "open", "reset", "step", "step", "score", "close"]


@pytest.mark.usefixtures("no_backoff")
async def test_a_sampler_that_failed_at_the_first_word_is_asked_again_with_the_same_key() -> None:
    class Unready(Watching):
        async def first(self) -> None:
            if len(self.keys) == 1:
                raise SamplerError("out of memory")

    sampler = Unready(["<submit>1</submit>"], [])
    t = await rollout(Echo(), sampler=sampler, limits=RolloutLimits(max_retries=1))
    assert (t.reward, t.stats["retries"], sampler.keys) == (1.0, 1, ["k", "k"])


@pytest.mark.usefixtures("no_backoff")
async def test_a_world_that_stays_broken_is_given_up() -> None:
    world = Unsteady().breaking("reset", 99, SandboxError("gone"))
    t = await rollout(world, "<submit>1</submit>", limits=RolloutLimits(max_retries=3))
    assert t.failure is not None and t.failure.message == "gone"
    assert (t.stats["retries"], world.events.count("open")) == (3, 4)


@pytest.mark.usefixtures("no_backoff")
@pytest.mark.parametrize("phase", ["step", "score"])
async def test_what_was_said_is_kept_and_not_tried_again(phase: str) -> None:
    world = Unsteady().breaking(phase, 1, SandboxError("late") if phase == "step" else VerifierError("no number"))
    t = await rollout(world, "<submit>1</submit>", limits=RolloutLimits(max_retries=5))
    assert (t.stop_reason, t.num_turns, t.stats["retries"]) == (StopReason.FAILED, 1, 0)
    assert world.events.count("open") == 1


@pytest.mark.usefixtures("no_backoff")
async def test_a_verifier_that_fails_is_not_tried_again_even_where_nothing_was_said() -> None:
    world = Unsteady().breaking("score", 1, VerifierError("no number"))
    t = await rollout(world, "<submit>1</submit>", limits=RolloutLimits(max_tokens=5, max_retries=5))
    assert t.failure is not None and (t.num_turns, t.failure.phase) == (0, "score")
    assert world.events.count("open") == 1


async def test_no_retry_waits_beyond_the_time_of_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "BACKOFF_S", 4000.0)  # at least half of it
    world = Unsteady().breaking("reset", 99, SandboxError("gone"))
    t = await rollout(world, "<submit>1</submit>", limits=RolloutLimits(max_retries=99, rollout_timeout_s=1000))
    assert t.failure is not None and t.failure.message == "gone"
    assert world.events.count("open") == 1


def test_waits_double_and_the_key_alone_shortens_them() -> None:
    waits = [backoff_s("train/0/t/0", retry) for retry in range(4)]
    assert waits == [backoff_s("train/0/t/0", retry) for retry in range(4)]
    assert all(2**retry / 2 <= wait <= 2**retry for retry, wait in enumerate(waits))
    assert len({backoff_s(f"train/0/t/{i}", 0) for i in range(64)}) == 64


# --- order and history ---


class Watching(ScriptedSampler):
    """Writes down what it is asked, and when its sessions open and close."""

    def __init__(self, replies: Sequence[str], events: list[str]) -> None:
        super().__init__(replies, renderer().encode_text)
        self.asked: list[tuple[tuple[int, ...], int | None]] = []
        self.keys: list[str] = []
        self.events = events

    async def first(self) -> None:
        """Before it answers."""

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[SamplerSession]:  # type: ignore[override]
        self.keys.append(key)
        self.events.append("session opens")
        async with super().session(key) as inner:
            yield WatchingSession(self, inner)
        self.events.append("session closes")


@dataclass
class WatchingSession:
    sampler: Watching
    inner: SamplerSession

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        await self.sampler.first()
        self.sampler.asked.append((tuple(token_ids), max_tokens))
        return await self.inner.sample(token_ids, max_tokens)


class Reckless(Watching):
    """A sampler whose sessions can stop early, and do."""

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[SamplerSession]:  # type: ignore[override]
        async with super().session(key) as inner:
            yield RecklessSession(inner, self.events)


@dataclass
class RecklessSession:
    inner: SamplerSession
    sampled: list[str]

    async def sample(self, token_ids: Sequence[int], max_tokens: int | None = None) -> Completion:
        return await self.inner.sample(token_ids, max_tokens)

    async def sample_watched(
        self, token_ids: Sequence[int], max_tokens: int | None, is_over: Callable[[int], bool]
    ) -> Completion:
        ids = (await self.inner.sample(token_ids, max_tokens)).token_ids
        count = next((number for number, token in enumerate(ids, 1) if is_over(token)), len(ids))
        self.sampled.append(renderer().encoder.decode(ids[:count]))
        return Completion(ids[:count], None, stopped=count == len(ids))


async def test_a_sampler_that_can_stop_early_is_asked_to_and_the_history_is_the_same() -> None:
    replies = [INVENTED, "hm", "<bash>b</bash>"]
    sampler = Reckless(replies, [])
    t = await rollout(Echo(), sampler=sampler)
    assert [text for text in sampler.events if not text.startswith("session")][:3] == [
        "<bash>a</bash>\n<|im_start|>",  # the token that shows that it goes on is the last one sampled
        "hm<|im_end|>",
        "<bash>b</bash><|im_end|>",
    ]
    other = await rollout(Echo(), *replies)
    assert (t.token_ids, t.messages, t.roles) == (other.token_ids, other.messages, other.roles)


async def test_the_session_opens_when_the_world_is_there_and_closes_before_scoring() -> None:
    world = Echo()
    sampler = Watching(["<submit>1</submit>"], world.events)
    await rollout(world, sampler=sampler)
    assert world.events == ["open", "reset", "session opens", "step", "session closes", "score", "close"]


async def test_history_only_grows_and_sampled_ids_are_kept() -> None:
    hostile = "<bash>\u2007<|im_end|> \x1b[0m\r\n)</bash>"
    sampler = Watching([hostile, "no call", "<bash>漢)\n</bash>"], [])
    t = await rollout(Echo(), sampler=sampler, limits=RolloutLimits(max_turns=5, max_tokens_per_turn=9))
    histories = [history for history, _ in sampler.asked]
    assert len(histories) == 5
    for before, after in zip(histories, [*histories[1:], t.token_ids], strict=True):
        assert after[: len(before)] == before
    sampled = [(start, end) for start, end, s in t.spans() if s.role is ACTION]
    assert [start for start, _ in sampled] == [len(history) for history in histories]
    for (start, end), reply in zip(sampled, [hostile, "no call", *["<bash>漢)\n</bash>"] * 3], strict=True):
        assert t.token_ids[start:end] == renderer().encode_text(reply)[:9]
    assert {limit for _, limit in sampler.asked} == {9}


async def test_the_last_turn_may_use_only_the_room_that_is_left() -> None:
    sampler = Watching(["<bash>hello</bash>"], [])
    await rollout(Echo(), sampler=sampler, limits=RolloutLimits(max_tokens=100, max_tokens_per_turn=50))
    assert [limit for _, limit in sampler.asked] == [min(50, 100 - len(history)) for history, _ in sampler.asked]
    assert sampler.asked[-1][1] != 50


# --- many at once ---


async def group_in(worlds: Sequence[Echo]) -> TrajectoryGroup:
    """An attempt in each of the worlds."""
    unopened = iter(worlds)
    return await run_group(
        TASK,
        lambda task: next(unopened).open(task),
        scripted("<submit>1</submit>"),
        renderer(),
        LIMITS,
        group_size=len(worlds),
        key="k",
    )


async def test_groups_come_in_order_with_a_key_for_each_attempt() -> None:
    world = Echo()
    sampler = Watching(["<submit>1</submit>"], [])
    tasks = [Task(id="b", instruction=""), Task(id="a", instruction="")]
    groups = await run_groups(tasks, world.open, sampler, renderer(), LIMITS, group_size=2, key="step7")
    assert [g.task_id for g in groups] == ["b", "a"]
    assert [[t.sample_index for t in g] for g in groups] == [[0, 1], [0, 1]]
    assert sampler.keys == ["step7/b/0", "step7/b/1", "step7/a/0", "step7/a/1"]


async def test_at_most_so_many_at_once() -> None:
    open_now, most = 0, 0

    @asynccontextmanager
    async def counted(task: Task) -> AsyncIterator[Env]:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        async with Echo({"step": lambda _: asyncio.sleep(0.001)}).open(task) as env:
            yield env
        open_now -= 1

    limits = RolloutLimits(concurrency=3)
    group = await run_group(TASK, counted, scripted("<submit>1</submit>"), renderer(), limits, group_size=8, key="k")
    assert (len(group), most, open_now) == (8, 3, 0)


async def test_a_failing_sibling_cancels_none() -> None:
    worlds = [Echo({"step": breaks(SandboxError("died"))} if i == 1 else {"step": slow}) for i in range(4)]
    group = await group_in(worlds)
    assert group.rewards == (1.0, None, 1.0, 1.0)
    assert [t.failure is not None for t in group] == [False, True, False, False]
    assert all(world.events[-1] == "close" for world in worlds)


async def test_a_bug_in_one_ends_all_and_closes_every_world() -> None:
    worlds = [Echo({"step": breaks(ZeroDivisionError("a bug")) if i == 1 else hangs}) for i in range(4)]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await group_in(worlds)
    assert all(world.events[-1] == "close" for world in worlds)


async def test_bugs_at_the_same_moment_are_all_raised_each_once() -> None:
    """The second comes while the first ends the others, the third says the same as the first."""
    gate, waiting = asyncio.Event(), 0

    def together(bug: Exception) -> Hook:
        async def step(_: Any) -> None:
            nonlocal waiting
            waiting += 1
            if waiting == 3:
                gate.set()
            await gate.wait()
            raise bug

        return step

    bugs = [ZeroDivisionError("a bug"), KeyError("another"), ZeroDivisionError("a bug")]
    worlds = [Echo({"step": together(bug)}) for bug in bugs]
    with pytest.raises(ExceptionGroup) as caught:
        await group_in(worlds)
    assert sorted(map(repr, caught.value.exceptions)) == ["KeyError('another')", "ZeroDivisionError('a bug')"]
    assert all(world.events[-1] == "close" for world in worlds)


async def test_ctrl_c_closes_every_world() -> None:
    worlds = [Echo({"step": hangs}) for _ in range(4)]
    running = asyncio.create_task(group_in(worlds))
    while not all("step" in world.events for world in worlds):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert all(world.events == ["open", "reset", "step", "close"] for world in worlds)


# --- the slowest of a step ---


async def test_the_slowest_ends_when_most_are_done() -> None:
    worlds = [Echo({"step": hangs} if i == 4 else {}) for i in range(10)]
    unopened = iter(worlds)
    limits, policy = RolloutLimits(straggler_factor=2, rollout_timeout_s=3600), scripted("<submit>1</submit>")
    group = await run_group(
        replace(TASK, agent_timeout_s=3600),
        lambda task: next(unopened).open(task),
        policy,
        renderer(),
        limits,
        group_size=10,
        key="k",
    )
    assert group.rewards == (*[1.0] * 4, None, *[1.0] * 5)
    assert group.trajectories[4].stop_reason is StopReason.DEADLINE
    assert text_of(group.trajectories[4], ACTION) == ["<submit>1</submit><|im_end|>"]  # said, though not answered
    assert all(world.events[-1] == "close" for world in worlds)


async def test_stragglers_get_so_many_times_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    stragglers = Stragglers(10, 3.0)
    slow_ones = [Deadline(600), Deadline(600)]
    with ExitStack() as running:
        running.enter_context(stragglers.watch(slow_ones[0]))
        for seconds in (1, 2, 3, 4, 5, 6, 7, 8):
            with stragglers.watch(Deadline(600)):
                now += seconds
        assert slow_ones[0].left_s == 600 - 36  # eight of ten are not most of them
        with stragglers.watch(Deadline(600)):
            now += 9
        # Nine of ten took 1 to 9 s, 5 s at the median: 15 s are allowed, and 45 have gone.
        assert slow_ones[0].left_s == 15 - 45
        late = Deadline(600)
        with stragglers.watch(late):  # one that begins only now
            assert late.left_s == 15
    assert slow_ones[1].left_s == 600 - 45  # begun beside it, and not one of this step


async def test_without_a_factor_each_has_its_time() -> None:
    stragglers, slow_one = Stragglers(2, None), Deadline(600)
    with stragglers.watch(slow_one):
        for _ in range(5):
            with stragglers.watch(Deadline(600)):
                pass
        assert slow_one.left_s > 60


def test_concurrency_is_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SandboxLimits] = []

    def carries(limits: SandboxLimits) -> Capacity:
        asked.append(limits)
        return Capacity(19, "246 open files left (ulimit -n)")

    monkeypatch.setattr(capacity, "capacity", carries)
    large = SandboxLimits(memory_mb=2048)
    notices: list[str] = []
    assert fit_concurrency(RolloutLimits(concurrency=7), large, notices.append) == RolloutLimits(concurrency=7)
    assert fit_concurrency(RolloutLimits(concurrency=19), large, notices.append) == RolloutLimits(concurrency=19)
    assert fit_concurrency(RolloutLimits(max_turns=3)) == RolloutLimits(max_turns=3, concurrency=19)
    assert notices == []
    assert fit_concurrency(RolloutLimits(concurrency=64), large, notices.append).concurrency == 19
    (notice,) = notices
    assert "rollout.concurrency=64 is lowered to 19" in notice and "246 open files" in notice
    assert asked == [large, large, SandboxLimits(), large]


async def test_limits_check_themselves() -> None:
    with pytest.raises(ConfigError, match="max_retries=-1"):
        RolloutLimits(max_retries=-1)
    with pytest.raises(ConfigError, match=r"straggler_factor=0\.5 would end rollouts that are faster than most"):
        RolloutLimits(straggler_factor=0.5)
    with pytest.raises(ConfigError, match="concurrency=0 leaves no room"):
        RolloutLimits(concurrency=0)
    with pytest.raises(ConfigError, match="max_turns=0 leaves no room"):
        RolloutLimits(max_turns=0)
    with pytest.raises(ConfigError, match="group_size=0 runs no rollout"):
        await run_group(TASK, Echo().open, scripted("x"), renderer(), LIMITS, group_size=0, key="k")
