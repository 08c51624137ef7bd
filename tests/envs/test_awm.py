"""The Agent World Model: its files, our two scenarios in them, rollouts here and on a server.

Real FastAPI programs over real SQLite; the server is OpenEnv's, on the loopback.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="pip install 'backtalk[awm]'")
pytest.importorskip("sqlalchemy", reason="pip install 'backtalk[awm]'")

from backtalk.envs.awm.config import AwmConfig
from backtalk.envs.awm.env import AwmEnv
from backtalk.envs.awm.files import FILES, Scenario, read_scenarios
from backtalk.envs.awm.program import Program, new_database
from backtalk.envs.awm.shop import KINDS, Plan, generate_task, make_shop
from backtalk.envs.awm.world import AwmWorld, LocalScenarios, awm_tasks, open_scenarios
from backtalk.envs.base import Step
from backtalk.errors import ConfigError, DataError, InfrastructureError, VerifierError
from backtalk.exchange.read.openenv import awm_messages
from backtalk.messages import ToolCall
from backtalk.run.config import load_config
from backtalk.tasks.task import Split, Task
from backtalk.trajectory import TokenRole
from scenario_files import write_scenario

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src/backtalk/assets/awm"

# Solutions of the ten tasks of the ticket desk, in order.
DESK = (
    (("search_tickets", {"words": "router"}), ("list_agents", {}), ("assign_ticket", {"ticket_id": 102, "agent_id": 5}),
     ("done", {"answer": ""})),
    (("list_tickets", {"queue": "billing", "status": "open"}), ("done", {"answer": "There are 4."})),
    (("list_agents", {}), ("set_priority", {"ticket_id": 105, "priority": "high"}),
     ("assign_ticket", {"ticket_id": 105, "agent_id": 3}), ("done", {"answer": ""})),
    (("get_ticket", {"ticket_id": 106}), ("close_ticket", {"ticket_id": 106, "resolution": "duplicate"}),
     ("done", {"answer": "closed"})),
    (("search_tickets", {"words": "Harbour"}), ("reopen_ticket", {"ticket_id": 107}),
     ("add_comment", {"ticket_id": 107, "body": "We are looking into it."}), ("done", {"answer": ""})),
    (("move_ticket", {"ticket_id": 110, "queue": "accounts"}), ("assign_ticket", {"ticket_id": 110, "agent_id": 4}),
     ("done", {"answer": ""})),
    (("search_tickets", {"words": "Pine"}), ("done", {"answer": "102"})),
    (("assign_ticket", {"ticket_id": 108, "agent_id": 2}), ("close_ticket", {"ticket_id": 108, "resolution": "solved"}),
     ("done", {"answer": ""})),
    (("list_tickets", {"status": "waiting"}), ("done", {"answer": "It is high."})),
    (("list_tickets", {"priority": "low"}), ("set_priority", {"ticket_id": 110, "priority": "normal"}),
     ("set_priority", {"ticket_id": 112, "priority": "normal"}), ("done", {"answer": ""})),
)  # fmt: skip


def calls(*pairs: tuple[str, dict[str, Any]]) -> list[ToolCall]:
    return [ToolCall(tool, arguments) for tool, arguments in pairs]


def solution(task: Task) -> Plan:
    seed = task.metadata.get("seed", 0)
    kind = KINDS[task.metadata["task_idx"]] if "task_idx" in task.metadata else None
    return generate_task(seed, kind)[1]


class Recorded:
    """A session that keeps its calls with their observations, in the form of OpenEnv's captured episodes."""

    def __init__(self, session: Any) -> None:
        self._session, self.about, self.steps, self.reward = session, {}, [], None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def start(self) -> Any:
        result = await self._session.start()
        self.about = result.observation
        return result

    async def call(self, tool: str, arguments: Any) -> Any:
        result = await self._session.call(tool, arguments)
        if tool == "verify":
            self.reward = result.reward
        action = {"tool_name": tool, "arguments": dict(arguments)}
        self.steps.append({"action": action, "observation": {"done": result.done, **result.observation}})
        return result

    def episode(self, task: Task) -> dict[str, Any]:
        about = {"scenario": self.about["scenario"], "task": task.instruction, "task_idx": self.about["task_idx"]}
        tools = [tool.name for tool in self._session.tools]
        return {**about, "tools": tools, "steps": self.steps, "reward": self.reward}


def record(env: AwmEnv) -> Recorded:
    env._session = Recorded(env._session)
    return env._session


async def play(world: AwmWorld, task: Task, plan: list[ToolCall] | tuple[ToolCall, ...]) -> tuple[float | None, AwmEnv]:
    async with world.open(task) as env:
        record(env)
        await env.reset()
        for call in plan:
            await env.step(call)
        return await env.score(), env


def last(step: Step) -> str:
    return step.messages[0].text


@pytest.fixture(scope="module")
def shop() -> AwmWorld:
    return AwmWorld("shop", AwmConfig())


@pytest.fixture(scope="module")
def desk() -> AwmWorld:
    return AwmWorld("tickets", AwmConfig())


# --- the files ---


@pytest.mark.parametrize("name", ["shop", "tickets"])
def test_what_ships_is_what_the_recipe_writes_and_survives_reading(name: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "recipes/shop"))
    try:
        import write_worlds

        made: Scenario = getattr(write_worlds, name)()
    finally:
        sys.path.pop(0)
    write_scenario(made, tmp_path)
    assert read_scenarios(tmp_path) == {name: made}
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (ASSETS / name / file).read_bytes(), file
    assert len(made.tasks) == 10 and all(set(codes) == set(range(10)) for codes in made.verifiers.values())


def test_files_that_are_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Agent World Model dataset: it has no gen_scenario.jsonl, gen_tasks.jsonl"):
        read_scenarios(tmp_path)
    scenario = open_scenarios("tickets").scenarios["tickets"]
    write_scenario(scenario, tmp_path)
    (tmp_path / "gen_tasks.jsonl").write_text('{"scenario": "other", "tasks": []}\n')
    with pytest.raises(DataError, match=r"program for 'tickets', and gen_tasks.jsonl says nothing of it"):
        read_scenarios(tmp_path)
    (tmp_path / "gen_db.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"gen_db.jsonl:1 is not JSON"):
        read_scenarios(tmp_path)


def test_programs_that_cannot_run_say_why() -> None:
    good = open_scenarios("tickets").scenarios["tickets"]
    for program, said in (
        ("1 / 0", "cannot be executed: ZeroDivisionError"),
        ("app = 3", "makes no FastAPI app"),
        ("from fastapi import FastAPI\napp = FastAPI()", "no tool"),
    ):
        with pytest.raises(DataError, match=said):
            LocalScenarios({"x": replace(good, program=program)}).program("x")
    with pytest.raises(DataError, match="SQLite refuses 'INSERT INTO nowhere"):
        LocalScenarios({"x": replace(good, inserts=("INSERT INTO nowhere VALUES (1)",))}).program("x")


async def test_arguments_reach_the_program_as_they_were_given() -> None:
    tool = """
@app.get("/echo/{word}", operation_id="echo")
def echo(word: str, share: float = 0.0):
    return [word, share]

"""
    scenario = open_scenarios("tickets").scenarios["tickets"]
    before = '@app.get("/agents"'
    program = Program(replace(scenario, program=scenario.program.replace(before, tool + before)))
    for word, status, text in (("é b%", 200, '["é b%",0.5]'), ("a/b", 404, '{"detail":"Not Found"}')):
        reply = await program.call(new_database(), "echo", {"word": word, "share": 0.5})
        assert reply is not None and (reply.status_code, reply.text) == (status, text)
    assert await program.call(new_database(), "nowhere", {}) is None


def test_sources_that_do_not_exist_name_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"use awm:shop, awm:shop-ten, awm:tickets, the folder"):
        awm_tasks("shoop")
    with pytest.raises(ConfigError, match=r"has no scenario 'shop'; it has tickets"):
        awm_tasks("tickets#shop")
    with pytest.raises(ConfigError, match="verifier=sql"):
        AwmWorld("shop", AwmConfig(verifier="sql"))


# --- the worlds ---


async def test_every_task_of_the_files_is_solved_by_its_solution_and_by_nothing_less(
    shop: AwmWorld, desk: AwmWorld
) -> None:
    ten = AwmWorld("shop-ten", AwmConfig())
    plans = [(ten, task, solution(task).solution) for task in awm_tasks("shop-ten")]
    plans += [(desk, task, calls(*DESK[task.metadata["task_idx"]])) for task in awm_tasks("tickets")]
    assert len(plans) == 20
    for world, task, plan in plans:
        assert (await play(world, task, plan))[0] == 1.0, task.id
        assert (await play(world, task, []))[0] == 0.0, task.id  # untouched, no answer
        assert (await play(world, task, calls(("done", {"answer": ""}))))[0] == 0.0, task.id
        if len(plan) > 2:
            assert (await play(world, task, [*plan[:-2], plan[-1]]))[0] == 0.0, task.id  # the deed left out


async def test_seeded_shops_are_solvable_and_refuse_what_is_wrong(shop: AwmWorld) -> None:
    tasks = AwmWorld("shop", AwmConfig()).tasks(Split.HELD_OUT, 60, 0)
    assert {task.metadata["kind"] for task in tasks} == set(KINDS)
    for task in tasks[:30]:
        plan = solution(task)
        assert (await play(shop, task, plan.solution))[0] == 1.0, task.id
        more = ToolCall("add_to_cart", {"product_id": plan_product(task), "quantity": 1})
        assert (await play(shop, task, [more, *plan.solution]))[0] == 0.0, task.id  # right, and something else too
        if plan.answer is not None:
            wrong = ToolCall("done", {"answer": f"{plan.answer} or 7"} if plan.answer.isdigit() else {"answer": "yes"})
            assert (await play(shop, task, [*plan.calls, wrong]))[0] == 0.0, task.id


def plan_product(task: Task) -> int:
    return next(product.id for product in make_shop(task.metadata["seed"]).products if product.stock == 9)


def test_training_sees_other_shops_than_the_measurement() -> None:
    train = AwmWorld("shop", AwmConfig()).tasks(Split.TRAIN, 2000, 0)
    held_out = AwmWorld("shop", AwmConfig()).tasks(Split.HELD_OUT, 500, 0)
    assert (len(train), len(held_out)) == (2000, 500)
    shops = {generate_task(task.metadata["seed"])[0].inserts for task in train}
    assert len(shops) == 2000
    assert shops.isdisjoint(generate_task(task.metadata["seed"])[0].inserts for task in held_out)
    assert AwmWorld("shop", AwmConfig()).tasks(Split.TRAIN, 5, 1) != train[:5]


async def test_errors_teach_and_change_nothing(shop: AwmWorld, desk: AwmWorld) -> None:
    store = make_shop(0)
    gone = next(product for product in store.products if product.stock == 0)
    shipped = next(order for order in store.orders if order.status == "shipped")
    expired = next(code for code, (_, active) in store.coupons.items() if not active)
    told = {
        ("get_product", ("product_id", 9999)): "there is no product 9999; search_products gives ids",
        ("add_to_cart", ("product_id", gone.id)): f"{gone.name} is out of stock: 0 left, 1 wanted",
        ("cancel_order", ("order_id", shipped.id)): "is shipped; only open orders can be cancelled",
        ("apply_coupon", ("code", expired)): f"coupon {expired} has expired",
        ("remove_from_cart", ("product_id", gone.id)): "is not in the cart; view_cart shows what is",
    }
    async with AwmWorld("shop-ten", AwmConfig()).open(awm_tasks("shop-ten")[0]) as env:
        await env.reset()
        for (tool, (name, value)), said in told.items():
            step = await env.step(ToolCall(tool, {name: value}))
            assert said in json.loads(last(step))["error"]
            assert step.messages[0].parts[0].role is TokenRole.ENV_OUTPUT
        await env.step(ToolCall("done", {"answer": solution(env.task).answer}))
        assert await env.score() == 1.0
    async with desk.open(awm_tasks("tickets")[0]) as env:
        await env.reset()
        for tool, arguments, said in (
            ("add_comment", {"ticket_id": 109, "body": "x"}, "ticket 109 is closed; reopen_ticket opens it again"),
            ("close_ticket", {"ticket_id": 103, "resolution": "solved"}, "nobody works on ticket 103"),
            ("assign_ticket", {"ticket_id": 101, "agent_id": 77}, "there is no agent 77; list_agents gives ids"),
            ("reopen_ticket", {"ticket_id": 101}, "ticket 101 is open; only closed tickets can be reopened"),
            ("move_ticket", {"ticket_id": 101, "queue": "sales"}, "the queues are accounts, billing, network"),
        ):
            assert said in last(await env.step(ToolCall(tool, arguments)))


def test_tools_are_what_the_programs_say() -> None:
    shop, desk = (open_scenarios(name).program(name).tools for name in ("shop", "tickets"))
    for specs in (shop, desk):
        tools = {tool.name: tool for tool in specs}
        assert 8 <= len(tools) <= 12
        assert all(tool.description for tool in tools.values())
    parameters = {tool.name: tool.parameters for tool in shop}["return_item"]
    assert parameters["required"] == ["order_id", "product_id", "reason"]
    assert parameters["properties"]["reason"]["enum"] == ["broken", "wrong", "late", "unwanted"]
    assert "$ref" not in json.dumps([dict(tool.parameters) for tool in desk])


async def test_rollouts_side_by_side_do_not_see_each_other(shop: AwmWorld) -> None:
    task = AwmWorld("shop", AwmConfig()).tasks(Split.TRAIN, 1, 0)[0]
    product = plan_product(task)

    async def fill(quantity: int) -> str:
        async with shop.open(task) as env:
            await env.reset()
            for _ in range(quantity):
                await env.step(ToolCall("add_to_cart", {"product_id": product, "quantity": 1}))
                await asyncio.sleep(0)
            return last(await env.step(ToolCall("view_cart", {})))

    before, *after = await asyncio.gather(*(fill(quantity) for quantity in (0, 1, 2, 3)))
    totals = [json.loads(text)["total"] - json.loads(before)["total"] for text in after]
    assert totals[0] > 0 and totals == [totals[0], 2 * totals[0], 3 * totals[0]]


# --- roles, verdicts, what is captured ---


async def test_who_said_what(shop: AwmWorld) -> None:
    task = AwmWorld("shop", AwmConfig()).tasks(Split.TRAIN, 1, 0)[0]
    async with shop.open(task) as env:
        prompt = await env.reset()
        assert [(m.role, {part.role for part in m.parts}) for m in prompt] == [
            ("system", {TokenRole.CONTEXT}),
            ("user", {TokenRole.CONTEXT}),
        ]
        assert prompt[1].text == task.instruction
        hidden = await env.step(ToolCall("verify", {"verifier_mode": "code"}))
        assert hidden.messages[0].parts[0].role is TokenRole.WARNING  # not the agent's to call
        step = await env.step(ToolCall("done", {"answer": "no"}))
        assert step.done and step.submitted
        assert json.loads(last(step))["reward_type"] == "others"
        assert step.messages[0].parts[0].role is TokenRole.ENV_OUTPUT


async def test_a_warning_of_the_environment_is_a_warning_and_long_results_are_cut() -> None:
    from backtalk.envs.awm.env import observation_parts

    parts, cut = observation_parts({"warning": "slow down", "tool_result": "abcdefghij"}, 4)
    assert [(part.text, part.role.name) for part in parts] == [
        ("slow down\n", "WARNING"),
        ("ab", "ENV_OUTPUT"),
        ("\n[6 characters left out]\n", "WARNING"),
        ("ij", "ENV_OUTPUT"),
    ]
    assert cut
    assert observation_parts({"tool_result": ""}, 9)[0][0].role is TokenRole.WARNING


async def test_a_captured_episode_imports_as_it_was_played(shop: AwmWorld) -> None:
    task = AwmWorld("shop", AwmConfig()).tasks(Split.TRAIN, 1, 0)[0]
    said = []
    async with shop.open(task) as env:
        recorded = record(env)
        await env.reset()
        for call in (*calls(("get_product", {"product_id": 9999})), *solution(task).solution):
            said.append((await env.step(call)).messages[0])
        episode = json.loads(json.dumps(recorded.episode(task)))
    imported = [message for message in awm_messages(episode) if message.role == "tool"]
    assert [message.parts for message in imported] == [message.parts for message in said]
    assert [step["action"]["tool_name"] for step in episode["steps"]][-1] == "verify"
    assert episode["reward"] == 1.0 and episode["task"] == task.instruction


async def test_a_verifier_that_crashes_gives_no_reward() -> None:
    scenario = open_scenarios("tickets").scenarios["tickets"]
    for code, said in (
        ("def verify_it(initial_db_path):\n    return 1 / 0", "crashed: ZeroDivisionError"),
        ("def verify_it(initial_db_path):\n    return 'yes'", "neither 'complete' nor 'others'"),
        ("x = 1", "no function verify_"),
        (None, "no code verifier"),
    ):
        verifiers = {"code": {} if code is None else {0: code}}
        world = AwmWorld("tickets", AwmConfig())
        world._scenarios = LocalScenarios({"tickets": replace(scenario, verifiers=verifiers)})
        with pytest.raises(VerifierError, match=said):
            await play(world, awm_tasks("tickets")[0], calls(("done", {"answer": ""})))


async def test_a_task_that_nobody_scores_needs_no_verifier(shop: AwmWorld) -> None:
    task = shop.tasks(Split.TRAIN, 1, 0)[0]
    task = replace(task, metadata={**task.metadata, "world_model_only": True})
    reward, env = await play(shop, task, calls(("view_cart", {}), ("done", {"answer": ""})))
    assert reward is None and [step["action"]["tool_name"] for step in env._session.steps] == ["view_cart", "done"]


async def test_done_releases_the_database(shop: AwmWorld) -> None:
    session = open_scenarios("shop").session("shop", seed=3)
    assert (await session.start()).reward_type == "reset_ok"
    assert (await session.call("done", {})).done
    after = await session.call("view_cart", {})
    assert (after.reward_type, after.done) == ("episode_already_done", True)


# --- a server ---


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Our server, built with OpenEnv, on a free port of the loopback."""
    pytest.importorskip("openenv", reason="pip install 'backtalk[openenv]'")
    import uvicorn

    sys.path.insert(0, str(ROOT))
    from examples.awm_server import make_app

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(make_app(), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(20)


async def test_a_server_plays_the_same_rollouts(server: str) -> None:
    tasks = awm_tasks(f"{server}")
    assert [task.id for task in tasks] == [f"{name}/{idx}" for name in ("shop", "tickets") for idx in range(10)]
    assert [task.id for task in awm_tasks(f"{server}#tickets")] == [task.id for task in tasks[10:]]
    there, here = AwmWorld(server, AwmConfig()), AwmWorld("shop-ten", AwmConfig())
    for task in (tasks[3], tasks[8]):
        plan = (*calls(("get_product", {"product_id": 9999})), *solution(task).solution)
        (reward, remote), (expected, local) = await play(there, task, plan), await play(here, task, plan)
        assert reward == expected == 1.0
        assert remote.tools == local.tools
        assert remote._session.steps == local._session.steps  # byte for byte, but for what neither holds
    assert (await play(there, tasks[15], calls(*DESK[5])))[0] == 1.0
    with pytest.raises(InfrastructureError, match=r"reset_error: there is no scenario 'nowhere'"):
        await play(there, replace(tasks[0], metadata={"scenario": "nowhere", "task_idx": 0}), [])


async def test_a_server_without_a_judge_gives_no_reward_in_sql_mode(server: str) -> None:
    task = awm_tasks(f"{server}#shop")[3]
    world = AwmWorld(server, AwmConfig(verifier="sql"))
    with pytest.raises(VerifierError, match=r"no reward: sql verifier, judge_error.*cart_items"):
        await play(world, task, solution(task).solution)


async def test_a_server_of_something_else_is_refused() -> None:
    with pytest.raises(InfrastructureError, match="no OpenEnv server answers"):
        awm_tasks("http://127.0.0.1:9")


# --- training ---


async def test_the_preset_trains_on_what_the_shop_says(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from backtalk.run.log import RunLog
    from backtalk.run.train import train

    few = {"steps": 1, "tasks_per_step": 2, "group_size": 4, "evaluation.tasks": 2, "evaluation.samples_per_task": 2}
    folder = await train(load_config("shop", few), tmp_path / "run")
    (row,) = RunLog(folder).read_metrics()
    assert row["rollouts"] == 8 and row["failed"] == row["no_reward"] == 0
    assert row["invalid_calls"] < 2 and row["env_output_ce"] > 0 and row["world_model_coeff"] == 0.05
    assert any(name.startswith("env_output_ce/") for name in row)
    trained = {task.id for task in AwmWorld("shop", AwmConfig()).tasks(Split.TRAIN, 2000, 0)}
    measured = json.loads(RunLog(folder).evaluation_path(1).read_text())["tasks"]
    assert len(measured) == 2 and trained.isdisjoint(task["task_id"] for task in measured)
