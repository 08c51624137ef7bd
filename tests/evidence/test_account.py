"""The accounting: numbers worked out by hand, the published ones, and losses computed by torch alone."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from backtalk.cli import app
from backtalk.cli.account_tables import tables
from backtalk.evidence.account.characters import PREAMBLE, characters, recounted, transcribed
from backtalk.evidence.account.losses import advantages_of, as_if_sampled, three_losses
from backtalk.evidence.account.report import account_of, stretches, tally, total_of
from backtalk.run.log import RunLog, write_trajectories
from backtalk.trajectory import Segment, TokenRole, TokenWeights, Trajectory, TrajectoryGroup
from outside_data import AWM, needs
from tiny import tiny_model_dir

CONTEXT, TEMPLATE, ACTION, ENV, WARNING = TokenRole
runner = CliRunner()

# 12 tokens; the first has nothing before it, so 11 count.
EPISODE = Trajectory(
    task_id="t",
    sample_index=0,
    segments=(
        Segment(CONTEXT, (1, 2)),
        Segment(TEMPLATE, (3,)),
        Segment(ACTION, (4, 5), (-0.5, -1.0), turn=0),
        Segment(TEMPLATE, (6,), turn=0, tool="bash"),
        Segment(WARNING, (7,), turn=0, tool="bash"),
        Segment(ENV, (8, 9, 10), turn=0, tool="bash"),
        Segment(ACTION, (11,), (-2.0,), turn=1),
        Segment(ENV, (12,), turn=1, tool="submit"),
    ),
    reward=1.0,
)
LOGPROBS = [0.0, -9.0, -9.0, -0.5, -1.0, -9.0, -4.0, -1.0, -2.0, -3.0, -2.0, -6.0]
UNSAMPLED = replace(
    EPISODE,
    segments=tuple(replace(s, logprobs=None) if s.role is ACTION else s for s in EPISODE.segments),
)


def test_tokens_are_counted_by_role_turn_and_tool() -> None:
    account = account_of(EPISODE, LOGPROBS, advantage=1.0)
    assert dict(account.whole.tokens) == {"context": 1, "template": 2, "action": 3, "env_output": 4, "warning": 1}
    assert (account.whole.learnable, account.whole.discarded_share, account.num_turns) == (7, 4 / 7, 2)
    assert account.whole.cross_entropy("action") == pytest.approx(3.5 / 3)
    assert account.whole.cross_entropy("env_output") == 12 / 4  # 1 + 2 + 3 + 6
    assert account.whole.cross_entropy("warning") == 4
    assert [(place, found.tokens["action"], found.tokens["env_output"]) for place, found in account.turns.items()] == [
        ((0, "bash"), 2, 3),
        ((1, "submit"), 1, 1),
    ]
    assert account.tools["bash"].cross_entropy("env_output") == 2
    assert account.gap == 0  # the recorded logprobs are the model's own


def test_text_without_logprobs_is_the_agents_all_the_same() -> None:
    whole = account_of(UNSAMPLED).whole
    assert (whole.tokens["action"], whole.unsampled, whole.tokens["context"]) == (3, 3, 1)
    assert (whole.nats, whole.cross_entropy("action")) == (None, None)
    assert account_of(UNSAMPLED, LOGPROBS).gap is None
    assert as_if_sampled(UNSAMPLED, LOGPROBS) == EPISODE


def test_text_that_stands_first_in_a_turn_is_not_taken_for_an_action() -> None:
    given = replace(EPISODE, segments=(*EPISODE.segments[:-2], Segment(CONTEXT, (11,), turn=1), EPISODE.segments[-1]))
    account = account_of(given)
    assert (account.whole.tokens["action"], account.whole.tokens["context"], account.num_turns) == (2, 2, 1)
    assert as_if_sampled(given, LOGPROBS) == given


def test_every_branch_has_a_first_token_that_does_not_count() -> None:
    rewritten = replace(EPISODE, segments=(*EPISODE.segments[:4], Segment(ENV, (8, 9), turn=0, tool="x", branch=1)))
    assert tally(stretches(rewritten)).tokens["env_output"] == 1
    assert [(start, end) for start, end, _ in stretches(rewritten)] == [(1, 2), (2, 3), (3, 5), (5, 6), (7, 8)]


def test_the_three_losses_by_hand() -> None:
    """O is 5 tokens, environment and warning; the target is the environment's 4: 12 nats / 5."""
    grpo, echo, free = three_losses([EPISODE], [LOGPROBS], [0.5], world_model_coeff=0.1)
    assert (grpo.total, grpo.action_tokens, grpo.observed_tokens) == (-0.5, 3, 0)  # ratio 1: minus the advantage
    assert echo.world == free.world == pytest.approx(12 / 5)
    assert echo.total == pytest.approx(-0.5 + 0.1 * 12 / 5)
    assert (echo.action_tokens, echo.observed_tokens) == (3, 4)
    assert free.total == pytest.approx(12 / 5)
    assert (free.action_tokens, free.observed_tokens) == (0, 4)


def test_with_reward_0_ordinary_rl_learns_nothing() -> None:
    grpo, echo, _ = three_losses([EPISODE], [LOGPROBS], [0.0])
    assert (grpo.total, grpo.action_tokens) == (0, 0)
    assert echo.total == pytest.approx(0.05 * 12 / 5)
    assert (echo.action_tokens, echo.observed_tokens) == (0, 4)


def test_without_a_reward_there_is_no_policy_term() -> None:
    grpo, _, free = three_losses([replace(EPISODE, reward=None)], [LOGPROBS], [None])
    assert (grpo.total, grpo.action_tokens, free.observed_tokens) == (0, 0, 4)


def test_recorded_logprobs_make_the_ratio_as_in_training() -> None:
    other = [x - 0.1 if i in (3, 4, 10) else x for i, x in enumerate(LOGPROBS)]
    (grpo, _, _) = three_losses([EPISODE], [other], [1.0])
    assert grpo.total == pytest.approx(-torch.tensor(-0.1).exp().item())
    assert account_of(EPISODE, other).gap == pytest.approx(0.1)
    far = [x - 3 if i in (3, 4, 10) else x for i, x in enumerate(LOGPROBS)]
    (clipped, _, _) = three_losses([EPISODE], [far], [-1.0])
    assert (clipped.total, clipped.action_tokens) == (pytest.approx(0.8), 0)


def test_a_history_that_was_rewritten_is_one_row() -> None:
    rest = (Segment(CONTEXT, (1, 2), branch=1), Segment(ENV, (8, 9, 10), turn=1, tool="bash", branch=1))
    longer = replace(EPISODE, segments=(*EPISODE.segments, *rest))
    (_, _, free) = three_losses([longer], [[*LOGPROBS, 0.0, -9.0, -1.0, -1.0, -2.0]], [1.0])
    assert free.total == pytest.approx((12 + 4) / (5 + 3))


def test_the_advantage_is_the_groups_or_else_the_reward() -> None:
    other = replace(EPISODE, task_id="u", reward=0.25)
    group = [replace(EPISODE, reward=reward, sample_index=i) for i, reward in enumerate((0.0, 2.0, None))]
    first, second, none, alone = advantages_of([*group, other])
    assert (first, second) == (pytest.approx(-(2**-0.5), rel=1e-5), pytest.approx(2**-0.5, rel=1e-5))
    assert (none, alone) == (None, 0.25)


def test_several_episodes_add_up() -> None:
    total = total_of([account_of(EPISODE, LOGPROBS), account_of(EPISODE, LOGPROBS)])
    assert (total.num_turns, total.whole.learnable) == (4, 14)
    assert total.tools["submit"].cross_entropy("env_output") == 6
    assert total.turns[0, "bash"].tokens["env_output"] == 6


# ---------------------------------------------------------------- characters


def test_messages_are_written_out_as_the_published_accounting_does() -> None:
    record = {
        "task_id": "m",
        "reward": 1,
        "messages": [
            {"role": "user", "content": "Hi."},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "name": "f", "content": "ok"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Done."},
        ],
    }
    trajectory = transcribed(record, "chat", "where")
    assert trajectory is not None
    text = "".join(map(chr, trajectory.token_ids))
    call = '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>\n'
    result = "<tool_response>\nok\n</tool_response>\n"
    assert text == f"Hi.{call}{result}And?Done."
    whole = account_of(trajectory).whole
    assert whole.tokens["action"] == len(call) + len("Done.")
    assert whole.tokens["env_output"] == len(result)
    assert whole.tokens["context"] == 2 + len("And?")  # a person's second message is no observation
    assert (trajectory.task_id, trajectory.reward) == ("m", 1)


def test_ids_have_a_text_of_their_own() -> None:
    assert transcribed({"turns": [{"prompt_token_ids": [1]}]}, "openenv", "x") is None
    assert transcribed({"extra": {"rfc010": {}}, "messages": []}, "openenv", "x") is None
    counted = recounted(EPISODE, lambda ids: "ab" * len(ids))
    tokens = account_of(counted).whole.tokens
    assert (tokens["action"], tokens["env_output"], tokens["context"]) == (6, 8, 3)
    assert characters("aé") == (97, 233)


@needs(AWM)
def test_the_published_episode_gives_the_published_numbers(tmp_path: Path) -> None:
    out = tmp_path / "account.json"
    done = runner.invoke(app, ["account", str(AWM), "--tokenizer", "characters", "--json", str(out)])
    assert done.exit_code == 0, done.output
    (episode,) = json.loads(out.read_text())["episodes"]
    tokens = {"context": 1304, "template": 0, "action": 588, "env_output": 4659, "warning": 0}
    assert (episode["tokens"], episode["learnable"], episode["reward"]) == (tokens, 5247, 0.0)
    assert round(episode["discarded_share"], 2) == 0.89
    assert len(PREAMBLE) == 205


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("tiny") / "model")


def test_the_losses_are_those_of_torch_alone(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_trajectories(tmp_path / "e.jsonl", [EPISODE, replace(UNSAMPLED, task_id="u", reward=0.0)])
    out = tmp_path / "a.json"
    arguments = ["account", str(tmp_path / "e.jsonl"), "--model", str(tiny), "--coeff", "0.2", "--json", str(out)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())

    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.tensor([EPISODE.token_ids])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    # Position t of ``logprobs`` is token t + 1: actions are tokens 3, 4 and 10, the environment's 7, 8, 9 and 11.
    acted, observed = logprobs[[2, 3, 9]], logprobs[[6, 7, 8, 10]]
    ratio = (acted - torch.tensor([-0.5, -1.0, -2.0])).exp()
    grpo = -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean().item()
    world = -observed.sum().item() / 5
    first, second = found["scored"]
    assert first["losses"]["grpo"]["total"] == pytest.approx(grpo, rel=1e-4)
    assert first["losses"]["echo"]["total"] == pytest.approx(grpo + 0.2 * world, rel=1e-4)
    assert first["losses"]["verifier_free"]["total"] == pytest.approx(world, rel=1e-4)
    assert first["cross_entropy"]["env_output"] == pytest.approx(-observed.mean().item(), rel=1e-4)
    assert (second["losses"]["grpo"]["total"], second["losses"]["echo"]["observed_tokens"]) == (0, 4)
    assert found["losses"]["echo"]["total"] == pytest.approx((grpo + 2 * 0.2 * world) / 2, rel=1e-4)
    assert "this model's at temperature 1" in done.output  # the logprobs above are invented


def test_a_steps_advantages_are_those_on_record(tiny: Path, tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.write_config({"engine": {"model": "tiny"}})
    groups = [TrajectoryGroup("t", (EPISODE, replace(EPISODE, sample_index=1, reward=0.0)))]
    log.write_groups(3, groups)
    arguments = ["account", str(log.groups_path(3)), "--model", str(tiny), "--json", str(tmp_path / "a.json")]

    def advantages() -> tuple[list[float | None], str]:
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, done.output
        found = json.loads((tmp_path / "a.json").read_text())["scored"]
        return [episode["advantage"] for episode in found], done.output

    before, said = advantages()
    assert before == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert "no training step has left weights on record" in said
    nothing = (0.0,) * len(EPISODE)  # a length penalty turned the signs round, and one row was too old
    log.write_weights(3, groups, [TokenWeights(-0.567, nothing, nothing), TokenWeights(None, nothing, nothing)])
    after, said = advantages()
    assert after == [-0.567, None] and "those that the run was trained with" in said


def test_what_cannot_be_accounted_for_is_said(tiny: Path, tmp_path: Path) -> None:
    high = replace(EPISODE, segments=(*EPISODE.segments, Segment(ENV, (10**6,), turn=1)))
    write_trajectories(tmp_path / "high.jsonl", [high])
    asked = ["account", str(tmp_path / "high.jsonl"), "--tokenizer", str(tiny)]
    assert "token id 1000000 is none of the " in str(runner.invoke(app, asked).exception)
    long = replace(EPISODE, segments=(*EPISODE.segments, Segment(ENV, (8,) * 2048, turn=1)))
    write_trajectories(tmp_path / "long.jsonl", [long])
    asked = ["account", str(tmp_path / "long.jsonl"), "--model", str(tiny)]
    assert "2060 tokens and the context of" in str(runner.invoke(app, asked).exception)
    (tmp_path / "mixed.jsonl").write_text(json.dumps([{"role": "user", "content": "x"}]) + "\n{}\n")
    asked = ["account", str(tmp_path / "mixed.jsonl"), "--tokenizer", "characters"]
    assert "there is no rollout to account for" in str(runner.invoke(app, asked).exception)


def test_one_refused_record_costs_itself(tiny: Path, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "ls?"},
        {"role": "assistant", "content": "ls"},
        {"role": "tool", "content": "a"},
    ]
    (tmp_path / "mixed.jsonl").write_text(json.dumps(talk) + "\n{}\n")
    asked = ["account", str(tmp_path / "mixed.jsonl"), "--tokenizer", str(tiny)]
    done = runner.invoke(app, asked)
    assert done.exit_code == 1
    assert "refused" in done.output and "mixed.jsonl:2" in done.output
    written = runner.invoke(app, [*asked[:-1], "characters", "--json", str(tmp_path / "a.json")])
    assert written.exit_code == 1
    assert json.loads((tmp_path / "a.json").read_text())["total"]["tokens"]["action"] == 2


def test_of_many_episodes_only_the_sum_is_shown() -> None:
    def shown(count: int) -> str:
        console = Console(width=100, file=io.StringIO(), record=True)
        for part in tables([account_of(replace(EPISODE, sample_index=i)) for i in range(count)], "tokens"):
            console.print(part)
        return console.export_text()

    assert "t#1" in shown(2) and "all" in shown(2)
    assert "t#1" not in shown(5) and "all" in shown(5)
    assert "all" not in shown(1).split("\n")[1]
