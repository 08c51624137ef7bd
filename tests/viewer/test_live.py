"""The live page's answers: facts, weights and text as they are on record, found by query and by search, read-only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from recorded import HEAD, HOSTILE, TAIL, TOKENIZER, TRACEBACK, A, B, encode, leaking, weigh, write_run, write_step
from starlette.testclient import TestClient

from backtalk.cli.view import view
from backtalk.errors import DataError
from backtalk.run.log import RunLog, read_trajectory, write_trajectories
from backtalk.run.log.weights import read_weights_row
from backtalk.trajectory import TokenRole, Trajectory, TrajectoryGroup
from backtalk.viewer.live.app import Viewer, make_app
from backtalk.viewer.live.calls import read_action
from backtalk.viewer.live.query import Condition, parse_query
from backtalk.viewer.live.sources import Library
from backtalk.viewer.live.table import RolloutTable


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "echo_seed1")


@pytest.fixture
def library_of() -> Iterator[Callable[..., Library]]:
    opened: list[Library] = []

    def open_library(*paths: Path) -> Library:
        opened.append(Library(paths))
        return opened[-1]

    yield open_library
    for library in opened:
        library.close()


@pytest.fixture
def viewer_of(library_of: Callable[..., Library]) -> Callable[..., Viewer]:
    return lambda *paths: Viewer(library_of(*paths))


def ask(viewer: Viewer, q: str = "", **more: str) -> dict[str, Any]:
    """Return the table's answer, asked again until all files are read, as the page does."""
    while (found := viewer.rollouts({"q": q, "limit": "500", **more}))["pending"]:
        pass
    return found


def rows(viewer: Viewer, q: str = "", **more: str) -> list[tuple[Any, ...]]:
    found = ask(viewer, q, **more)
    assert found["problems"] == []
    return [(row["part"], row["row"]) for row in found["rows"]]


# ---------------------------------------------------------------- the table


def test_a_row_says_what_is_on_record(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    found = ask(viewer_of(run), "part=train-1")
    assert (found["total"], found["means"]["reward"], found["stops"]) == (4, 0.5, {"submitted": 3, "failed": 1})
    by_row = {row["row"]: row for row in found["rows"]}
    action, output = len(encode("<bash>ls</bash><|im_end|>")), len(encode(HOSTILE))
    around, frame = len(encode(HEAD + "count the lines" + TAIL)), len(encode("\n<|im_start|>tool\n"))
    assert {name: by_row[1][name] for name in ("run", "task", "group", "sample", "reward", "advantage", "turns")} == {
        "run": "echo_seed1", "task": "a", "group": 0, "sample": 1, "reward": 0.0, "advantage": -1.5, "turns": 2,
    }  # fmt: skip
    assert (by_row[1]["action"], by_row[1]["env"], by_row[1]["warning"]) == (2 * action, 2 * output, 0)
    assert by_row[1]["tokens"] == around + 2 * (action + frame + output)
    assert (by_row[1]["invalid"], by_row[1]["branches"], by_row[1]["stop"]) == (1.0, 1, "submitted")
    assert (by_row[3]["group"], by_row[3]["reward"], by_row[3]["advantage"]) == (1, None, None)
    assert by_row[3]["failure"] == {"phase": "step", "error": "SandboxError", "message": "bwrap <b>died</b>"}


def test_queries_select_sort_and_page(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    viewer = viewer_of(run)
    assert rows(viewer, "kind:train step:1") == [("train-1", i) for i in range(4)]
    assert rows(viewer, "kind:eval") == [("eval-0", 0), ("eval-0", 1)]
    assert rows(viewer, "reward<1 kind:train", sort="reward", order="asc")[:2] == [("train-1", 1), ("train-0", 1)]
    assert rows(viewer, "failed step:1") == rows(viewer, "failure:sandbox step=1") == [("train-1", 3)]
    assert rows(viewer, "advantage:-2..0 step:1") == [("train-1", 1), ("train-1", 2)]
    assert rows(viewer, "turns>1 step:1,7 kind!=eval") == [("train-1", 1)]
    assert rows(viewer, "task:a step:1", offset="1", limit="1") == [("train-1", 1)]
    assert rows(viewer, "step:1.. task=a") == [("train-1", 0), ("train-1", 1)]


def test_words_are_searched_in_what_was_said(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    viewer = viewer_of(run)
    assert rows(viewer, "notes.txt step:1") == [("train-1", 2)]  # case does not count
    assert rows(viewer, '"total 3" step:0 kind:train') == [("train-0", 3)]
    assert rows(viewer, "<script>alert(1)</script> evil step:0 kind:train") == [("train-0", 1)]
    assert rows(viewer, "total nowhere") == []
    found = ask(viewer, "NOTES step:1")["rows"][0]
    assert found["snippet"] == "Notes.txt"
    log = RunLog(run)  # without messages the tokens are searched
    bare = [Trajectory(task_id="c", sample_index=0, segments=A.trajectories[0].segments)]
    log.write_groups(2, [TrajectoryGroup("c", tuple(bare))])
    assert rows(viewer_of(run), '"total 12" step:2') == [("train-2", 0)]


def test_what_is_no_condition_is_a_word() -> None:
    query = parse_query('reward<1 stop:max_turns,deadline http://x y=2 step:abc "two words" failed task:a..b')
    assert query.conditions == (
        Condition("reward", "<", "1"), Condition("stop", ":", "max_turns,deadline"), Condition("stop", ":", "failed"),
        Condition("task", ":", "a..b"),
    )  # fmt: skip
    assert query.words == ("http://x", "y=2", "step:abc", "two words")
    assert parse_query("reward< :x step:..").words == ("reward<", ":x")


def test_files_are_read_a_few_at_a_time_and_only_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, library_of: Callable[..., Library]
) -> None:
    library, table = library_of(run), RolloutTable()
    sources = list(library.sources().values())
    found, pending, problems = table.read(sources, budget_s=-1.0)
    assert (found.num_rows, pending, problems) == (4, 2, [])  # one file at least
    assert [table.read(sources, budget_s=-1.0)[1] for _ in range(2)] == [1, 0]
    monkeypatch.setattr("backtalk.viewer.live.table.read_facts", lambda *_: pytest.fail("was read again"))
    assert table.read(sources)[0].num_rows == 10


def test_rollouts_are_sorted_and_selected_by_what_surprised_the_last_checkpoint(
    run: Path, viewer_of: Callable[..., Viewer]
) -> None:
    viewer = viewer_of(run)
    outputs = [sum(role is TokenRole.ENV_OUTPUT for role in t.roles) for t in (*A, *B)]
    found = ask(viewer, "surprise>0", sort="surprise", order="desc")["rows"]
    assert {row["part"] for row in found} == {"train-1"}  # the step that was scored
    assert [row["surprise"] for row in found] == pytest.approx(sorted((1 + 5 / n for n in outputs), reverse=True))
    assert rows(viewer, f"surprise<{1.01 + 5 / max(outputs)} step:1") == [("train-1", 1)]


# ---------------------------------------------------------------- the world model


def test_world_models_are_summed_by_tool_and_kind_and_compared(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    found = viewer_of(run).world({})
    outputs = [sum(role is TokenRole.ENV_OUTPUT for role in t.roles) for t in (*A, *B)]
    before, after = found["checkpoints"]
    assert (found["before"], found["after"], found["rollouts"], found["pending"]) == ("before", "after", 4, 0)
    assert before["rows"] == [{"tool": "bash", "kind": "new", "tokens": sum(outputs), "ce": 2.0}]
    assert after["ce"] == pytest.approx((sum(outputs) + 4 * 5) / sum(outputs)) and before["bins"] == []
    # Four tokens came where "ls" had exp(-0.25) = 0.7788; the others had exp(-1) = 0.3679 and were the likeliest.
    wrong, right = sorted(after["bins"], key=lambda row: row["tokens"])
    assert (wrong["tokens"], wrong["right"], right["tokens"], right["right"]) == (4, 0, sum(outputs) - 4, 1)
    assert (wrong["sure"], right["sure"]) == (pytest.approx(0.7788, abs=1e-4), pytest.approx(0.3679, abs=1e-4))
    assert after["calibration_error"] == pytest.approx(
        (4 * 0.7788 + (sum(outputs) - 4) * 0.6321) / sum(outputs), abs=1e-4
    )
    assert [(row["gain"], row["nats"], row["task"]) for row in found["worse"][:4]] == [(-4, [2, 6], t) for t in "aabb"]
    assert all(row["gain"] == 1.0 for row in found["better"][:4])
    back = viewer_of(run).world({"before": "after", "after": "before"})
    assert [row["gain"] for row in back["better"][:4]] == [4.0] * 4
    assert viewer_of(run).world({"runs": "echo_seed1", "before": "nobody"})["before"] == "before"


def test_a_study_shows_its_cross_entropies(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    assert viewer_of(run).world({})["studies"] == []
    rows = [{"metric": "env CE, own", "arm": "echo"}, {"metric": "pass@1", "arm": "echo"}]
    study = {"study": "x", "interval": "seeds", "seeds": [1], "results": rows}
    (run.parent / "study.json").write_text(json.dumps(study | {"curves": [1, 2]}))
    assert viewer_of(run.parent).world({})["studies"] == viewer_of(run.parent).studies({}) == [study]


def test_runs_show_what_they_measured_first_and_last_and_what_they_dreamt(
    run: Path, viewer_of: Callable[..., Viewer]
) -> None:
    viewer, log = viewer_of(run), RunLog(run)
    assert viewer.knowledge({}) == []
    for step, share in ((0, 0.5), (1, 0.75), (2, 1.0)):
        recorded = {
            "estimates": {"true_preferred": {"value": share}},
            "examples": [{"key": "a/0/0", "true_ce": 2 - share}],
        }
        log.write_world_model(step, {"step": step, "sets": {"recorded": recorded, "own": None}})
    dreamed = {"step": 2, "command": "$ ls", "expected": "a", "actual": "b", "ce": 1.5}
    log.write_dream(dreamed)
    (found,) = viewer.knowledge({})
    first, last = ({"true_preferred": {"value": share}} for share in (0.5, 1.0))
    assert found["measured"] == [{"set": "recorded", "steps": [0, 2], "first": first, "last": last}]
    assert [found["examples"][end][0]["true_ce"] for end in ("first", "last")] == [1.5, 1.0]
    assert found["dreams"] == [dreamed]
    log.world_model_path(2).write_text('{"step": 2, "sets"')  # half written
    assert viewer.knowledge({})[0]["measured"] == [{"set": "recorded", "steps": [0, 2], "first": first, "last": None}]


# ---------------------------------------------------------------- one rollout


def test_a_scored_rollout_shows_what_each_checkpoint_made_of_it(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    which, viewer = {"run": "echo_seed1", "part": "train-1", "row": "1"}, viewer_of(run)
    first, scores = A.trajectories[1].roles.index(TokenRole.ENV_OUTPUT), viewer.tokens(which)["scores"]
    assert list(scores) == ["before", "after"] and scores["before"]["logprobs"][first] == -2.0
    assert scores["after"]["logprobs"][first : first + 2] == [-6.0, -1.0]
    likelier = [TOKENIZER.decode([encode(text)[0]]) for text in ("ls", "x")]
    assert scores["after"]["expected"] == {first: [[likelier[0], -0.25], [likelier[1], -4.0]]}
    shown = viewer.rollout(which)
    worst = shown["surprises"]["after"][0]
    assert (worst["at"], worst["nats"], worst["elsewhere"]) == (first, 6.0, {"before": 2.0})
    assert worst["before"].endswith("tool\n") and worst["expected"][0] == [likelier[0], -0.25]
    said = next(segment for segment in shown["segments"] if segment["role"] == "ENV_OUTPUT")
    length = said["end"] - said["start"]
    assert said["ce"] == {"before": 2.0, "after": pytest.approx(1 + 5 / length)}
    viewer = viewer_of(run)
    RunLog(run).write_groups(1, [B])  # the step was made again
    with pytest.raises(DataError, match=r"score it again|belongs to another step"):
        viewer.rollout({**which, "row": "0"})


def test_a_rollout_shows_the_weights_it_was_trained_with(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    which = {"run": "echo_seed1", "part": "train-1", "row": "1"}
    viewer = viewer_of(run)
    shown, tokens = viewer.rollout(which), viewer.tokens(which)
    action, output = len(encode("<bash>ls</bash><|im_end|>")), len(encode(HOSTILE))
    assert (shown["advantage"], shown["trained"], shown["group"], len(shown["siblings"])) == (-1.5, True, 0, 2)
    roles = {row["role"]: row for row in shown["roles"]}
    assert (roles["ACTION"]["policy_sum"], roles["ACTION"]["policy_tokens"]) == (-0.75 * 2 * action, 2 * action)
    assert roles["ENV_OUTPUT"]["world_sum"] == 0.125 * 2 * output and roles["TEMPLATE"]["policy_tokens"] == 0
    first = next(segment for segment in shown["segments"] if segment["role"] == "ACTION")
    assert first["action"] == {"calls": [{"tool": "bash", "arguments": {"command": "ls"}}]}
    assert first["text"] == "<bash>ls</bash><|im_end|>" and first["stop_chars"] == len("<|im_end|>")
    assert first["logprob"] == pytest.approx(-0.25 * (action - 1) / 2) and first["policy"] == -0.75 * action
    said = next(segment for segment in shown["segments"] if segment["role"] == "ENV_OUTPUT")
    assert said["text"] == HOSTILE and said["world"] == 0.125 * output  # as it is: the page makes it harmless
    position = first["start"] + 2
    assert tokens["policy"][position] == -0.75 and tokens["logprobs"][position] == -0.5
    assert tokens["ids"][position] == encode("<bash>ls</bash><|im_end|>")[2]
    assert tokens["world"][said["start"]] == 0.125 and tokens["logprobs"][said["start"]] is None
    assert "".join(tokens["texts"][said["start"] : said["end"]]) == HOSTILE
    assert shown["findings"] == [] and shown["compared"]


def test_a_step_that_has_not_trained_has_no_weights(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    write_step(RunLog(run), 2, trained=False)
    shown = viewer_of(run).rollout({"run": "echo_seed1", "part": "train-2", "row": "0"})
    assert (shown["trained"], shown["advantage"]) == (False, None)
    assert all("policy" not in segment for segment in shown["segments"])
    failed = viewer_of(run).rollout({"run": "echo_seed1", "part": "train-1", "row": "3"})
    assert (failed["failure"]["message"], failed["failure"]["traceback"]) == ("bwrap <b>died</b>", TRACEBACK)
    assert failed["trained"] and failed["advantage"] is None  # outside the baseline, and its output still teaches
    assert next(row for row in failed["roles"] if row["role"] == "ENV_OUTPUT")["world_tokens"] > 0


def test_the_audit_finds_tokens_whose_role_and_text_do_not_agree(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    wrong, weights = leaking()
    log = RunLog(run)
    group = TrajectoryGroup("a", (wrong,))
    log.write_groups(2, [group])
    log.write_weights(2, [group], [weights])
    shown = viewer_of(run).rollout({"run": "echo_seed1", "part": "train-2", "row": "0"})
    found = {finding["kind"]: finding["positions"] for finding in shown["findings"]}
    assert found == {
        "in_no_message": [len(wrong) - 2, len(wrong) - 1],
        "template_trained": [0],
        "policy_on_unsampled": [0],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>hm</think>\nGo.\n<bash>ls -l</bash>", {"thinking": "hm", "said": "Go.", "calls": [("bash", "ls -l")]}),
        ('<tool_call>\n{"name": "f", "arguments": {"x": "1"}}\n</tool_call>', {"calls": [("f", "1")]}),
        (
            "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
            {"calls": [("f", "1")]},
        ),
        ("Look:\n```bash\nls\n```", {"said": "Look:", "calls": [("bash", "ls")]}),
        ("no call <b>at</b all", {"said": "no call <b>at</b all"}),
        ("", {}),
    ],
)
def test_an_action_is_read_as_people_do(text: str, expected: dict[str, Any]) -> None:
    found = read_action(text)
    calls = [(call["tool"], *map(str, call["arguments"].values())) for call in found.pop("calls", [])]
    assert {**found, **({"calls": calls} if calls else {})} == expected


def test_one_row_of_a_file_is_read_alone(run: Path) -> None:
    log = RunLog(run)
    assert read_trajectory(log.groups_path(0), 2) == B.trajectories[0]
    assert read_weights_row(log.weights_path(0), 1, len(A.trajectories[1])) == weigh(A.trajectories[1], -1.5)
    with pytest.raises(DataError, match="has 4 rows, so none at 4"):
        read_trajectory(log.groups_path(0), 4)
    with pytest.raises(DataError, match=r"weights of .* tokens in row 0, and the trajectory has 1"):
        read_weights_row(log.weights_path(0), 0, 1)


# ---------------------------------------------------------------- curves


def test_curves_have_three_axes_evaluations_and_the_guards_warnings(
    run: Path, viewer_of: Callable[..., Viewer]
) -> None:
    curves = viewer_of(run).curves({"run": "echo_seed1"})
    assert (curves["steps"], curves["seconds"], curves["tokens"]) == ([0, 1], [2.0, 4.0], [32.0, 64.0])
    assert curves["metrics"]["reward"] == [0.5, 1.5] and "ce" not in curves["metrics"]  # which was never measured
    assert curves["evaluations"] == [
        {"step": 0, "samples_per_task": 2, "pass_at_1": {"value": 0.25, "low": 0.1, "high": 0.4}}
    ]
    assert [(w["step"], w["text"].split(":")[0]) for w in curves["warnings"]] == [(1, "world_grad_share=0.7")]
    assert curves["settings"]["objective.world_model_coeff"] == 0.05


def test_a_finished_study_gives_its_own_intervals(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    assert viewer_of(run).curves({"run": "echo_seed1"})["arm_curves"] == {}
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    points = [{"arm": arm, "metric": metric, "step": 3, "interval": interval}
              for arm, metric in (("echo", "pass@1"), ("grpo", "pass@1"), ("echo", "invalid calls"))]  # fmt: skip
    (run.parent / "study.json").write_text(json.dumps({"interval": "seeds and tasks", "curves": points}))
    assert viewer_of(run).curves({"run": "echo_seed1"})["arm_curves"] == {
        "over": "seeds and tasks", "curves": {"pass_at_1": [{"step": 3, **interval}]},
    }  # fmt: skip


# ---------------------------------------------------------------- sources


def test_runs_and_files_are_found_also_while_they_appear(
    run: Path, monkeypatch: pytest.MonkeyPatch, viewer_of: Callable[..., Viewer]
) -> None:
    monkeypatch.setattr("backtalk.viewer.live.sources.RESCAN_S", 0.0)
    root = run.parent
    (root / "not_a_run").mkdir()
    viewer = viewer_of(root)
    described = viewer.sources({})["sources"]
    assert [(s["name"], s["arm"], s["seed"], s["done"], s["steps"], s["state"]) for s in described] == [
        ("echo_seed1", "echo", 1, 2, 3, "running")
    ]
    shutil.copytree(run, root / "deeper" / "grpo_seed1")
    assert [s["name"] for s in viewer.sources({})["sources"]] == ["deeper/grpo_seed1", "echo_seed1"]
    assert viewer.sources({})["sources"][0]["arm"] == "deeper/grpo"  # arms of two studies stay apart
    shutil.rmtree(root / "deeper")
    assert [s["name"] for s in viewer.sources({})["sources"]] == ["echo_seed1"]
    with pytest.raises(DataError, match=r"no run or file '../../etc'"):
        viewer.rollouts({"runs": "../../etc"})


def test_half_written_files_cost_only_themselves(run: Path, viewer_of: Callable[..., Viewer]) -> None:
    log = RunLog(run)
    whole = log.groups_path(1).read_bytes()
    log.groups_path(1).write_bytes(whole[: len(whole) // 2])
    with open(log.metrics_path, "ab") as file:
        file.write(b'{"step": 2, "rew')
    viewer = viewer_of(run)
    found = ask(viewer)
    assert found["total"] == 6 and len(found["problems"]) == 1 and "not a whole Parquet file" in found["problems"][0]
    assert viewer.curves({"run": "echo_seed1"})["steps"] == [0, 1]
    log.groups_path(1).write_bytes(whole)
    assert ask(viewer)["total"] == 10
    log.truncate_after(-1)  # as a resume from the beginning does
    assert ask(viewer)["total"] == 2 and viewer.curves({"run": "echo_seed1"})["steps"] == []


def test_files_of_others_are_opened_as_they_are(run: Path, tmp_path: Path, viewer_of: Callable[..., Viewer]) -> None:
    trl = {"prompt_ids": [[1, 2]], "completion_ids": [[3, 4]], "logprobs": [[-0.5, -1.0]], "rewards": [0.5]}
    path = tmp_path / "trl.json"
    path.write_text(json.dumps(trl))
    ours = tmp_path / "ours.jsonl"
    write_trajectories(ours, A.trajectories)
    with open(ours, "a") as file:
        file.write("this line is broken\n")
    viewer = viewer_of(path, ours, RunLog(run).groups_path(1))
    assert [s["name"] for s in viewer.sources({})["sources"]] == ["trl.json", "ours.jsonl", "step_00001.parquet"]
    found = ask(viewer, runs="ours.jsonl")
    assert found["total"] == 2 and len(found["problems"]) == 1 and "is not JSON" in found["problems"][0]
    shown = viewer.rollout({"run": "trl.json", "part": "file", "row": "0"})
    assert [s["text"] for s in shown["segments"]] == ["⟨1⟩ ⟨2⟩", "⟨3⟩ ⟨4⟩"] and not shown["has_text"]
    assert shown["segments"][1]["logprob"] == -0.75
    step = viewer.rollout({"run": "step_00001.parquet", "part": "file", "row": "0"})  # its run knows the tokenizer
    assert step["advantage"] == 1.5 and step["segments"][1]["text"] == "count the lines"


def test_a_file_that_cannot_be_read_is_said_and_costs_only_itself(
    run: Path, tmp_path: Path, viewer_of: Callable[..., Viewer], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 no more than this")
    viewer = viewer_of(path, run)
    found = ask(viewer, "total")
    assert found["total"] == 5 and len(found["problems"]) == 1 and "broken.parquet" in found["problems"][0]
    monkeypatch.setattr("backtalk.viewer.live.sources.read_rollouts", lambda *_: pytest.fail("was read again"))
    assert len(ask(viewer)["problems"]) == 1
    with pytest.raises(DataError, match="does not exist; pass a run folder"):
        view([tmp_path / "absent"])


# ---------------------------------------------------------------- the server


@pytest.fixture
def client(run: Path, library_of: Callable[..., Library]) -> TestClient:
    return TestClient(make_app(library_of(run)), base_url="http://127.0.0.1:7870")


def test_the_server_answers_only_this_machine_and_reads_only(client: TestClient) -> None:
    assert client.get("/api/sources").json()["sources"][0]["name"] == "echo_seed1"
    assert client.get("/api/sources", headers={"Host": "evil.example:7870"}).status_code == 400
    assert client.get("/api/sources", headers={"Host": "localhost:9"}).status_code == 200
    assert client.post("/api/sources").status_code == 405
    for path in ("/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/%2e%2e/data.py", "/etc/passwd"):
        assert client.get(path).status_code == 404


def test_every_answer_has_a_strict_policy_and_a_tag(client: TestClient) -> None:
    for path in ("/", "/static/app.js", "/api/sources"):
        answer = client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self'" in policy and "unsafe" not in policy and "default-src 'none'" in policy
    tag = client.get("/api/curves?run=echo_seed1").headers["etag"]
    assert client.get("/api/curves?run=echo_seed1", headers={"If-None-Match": tag}).status_code == 304


def test_mistakes_are_answered_in_words(client: TestClient) -> None:
    for question, words in (
        ("rollout?run=nothing&part=x&row=0", "no run or file 'nothing'"),
        ("rollout?run=echo_seed1&part=train-9&row=0", "no trajectories 'train-9'"),
        ("rollout?run=echo_seed1&part=train-0&row=99", "so none at 99"),
        ("rollout?run=echo_seed1&part=train-0&row=abc", "row has to be a whole number"),
    ):
        answer = client.get(f"/api/{question}")
        assert answer.status_code == 404 and words in answer.json()["error"]


def test_a_bug_is_answered_in_words_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("backtalk.viewer.live.answers.read_curves", fail)
    answer = client.get("/api/curves?run=echo_seed1")
    assert answer.status_code == 500 and answer.json()["error"].startswith("ZeroDivisionError: by zero")


def test_a_missing_tokenizer_is_said(run: Path, library_of: Callable[..., Library]) -> None:
    log = RunLog(run)
    (run / "tokenizer" / "tokenizer.json").unlink()
    client = TestClient(make_app(library_of(log.folder)), base_url="http://127.0.0.1")
    answer = client.get("/api/rollout?run=echo_seed1&part=train-0&row=0")
    assert answer.status_code == 404 and "tokenizer.json is missing" in answer.json()["error"]
    assert client.get("/api/rollouts").json()["total"] == 10  # the table needs no tokenizer


def test_the_page_loads_nothing_from_elsewhere_and_writes_no_html() -> None:
    source = Path(str(resources.files("backtalk"))) / "viewer" / "web" / "src"
    for path in [*source.glob("*.ts"), *source.glob("*.html"), *source.glob("*.css")]:
        text = path.read_text()
        assert "https://" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", ""), path
        assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write")), (
            path
        )
