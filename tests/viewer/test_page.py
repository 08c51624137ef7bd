"""The page in a real browser: a run that is being written, the table, a rollout, its tokens, hostile text, a phone.

Needs playwright and Chromium, which `scripts/viewer test` brings.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode
from urllib.request import urlopen

import pytest
from recorded import TRACEBACK, A, B, encode, forked, leaking, weigh, write_run, write_step
from studied import ARMS, write_foreign, write_study

from backtalk.run.log import RunLog, read_trajectories
from backtalk.trajectory import Failure, TokenRole, TrajectoryGroup
from backtalk.viewer.live.export import write_page

Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="scripts/viewer brings axe").Axe
sync_api = pytest.importorskip("playwright.sync_api", reason="scripts/viewer test drives the page in a browser")
pytestmark = pytest.mark.filterwarnings("ignore")
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "echo_seed1")


@contextmanager
def served(path: Path, *options: str) -> Iterator[str]:
    """Serve the page over a path; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "backtalk.cli", "view", str(path), "--port", str(port), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urlopen(f"http://127.0.0.1:{port}/", timeout=30).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with served(run.parent) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = shutil.which("chromium")
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    opened.on("dialog", lambda dialog: (problems.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
    yield opened
    context.close()
    assert problems == []


def text_of(page: Any, selector: str) -> str:
    """Return the text that is seen, on one line, with a plain minus."""
    return " ".join(page.locator(selector).first.inner_text().split()).replace("\u2212", "-")


def wait_for_text(page: Any, selector: str, *parts: str) -> None:
    """Wait until all of the parts are seen; what has just been put in has no text before the next frame is laid out."""
    end = time.monotonic() + WAIT_MS / 1000
    while any(part not in text_of(page, selector) for part in parts):
        assert time.monotonic() < end, f"{selector} says {text_of(page, selector)!r}, not all of {parts}"
        page.wait_for_timeout(20)


def test_curves_are_drawn_and_new_steps_appear_by_themselves(page: Any, address: str, run: Path) -> None:
    page.goto(f"{address}#/overview?find=reward")
    page.wait_for_selector("[data-name=reward] canvas")
    wait_for_text(page, "[data-name=reward] .readings", "1.5")
    wait_for_text(page, ".warnings", "world_grad_share=0.7")
    log = RunLog(run)
    write_step(log, 2)
    log.write_metrics(2, {"reward": 4.5, "world_model_coeff": 0.05})
    sync_api.expect(page.locator("[data-name=reward] .readings")).to_contain_text("4.5", timeout=WAIT_MS)
    wait_for_text(page, ".source-facts", "3 of 3 steps")


def test_all_charts_follow_the_pointer_and_a_zoom(page: Any, address: str) -> None:
    page.set_viewport_size({"width": 1280, "height": 1600})  # charts are drawn when they come near the window
    page.goto(f"{address}#/overview")
    charts = [page.locator(f"[data-name={name}]") for name in ("reward", "world_grad_share")]
    box = charts[0].locator(".u-over").bounding_box()
    left, right, middle = box["x"] + 2, box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2
    page.mouse.move(left, middle)
    for chart, value in zip(charts, ("0.5", "0.1"), strict=True):  # step 0, by hand in recorded.py
        sync_api.expect(chart.locator(".at")).to_have_text("step 0", timeout=WAIT_MS)
        sync_api.expect(chart.locator(".reading b")).to_have_text(value, timeout=WAIT_MS)
    page.mouse.down()
    page.mouse.move(right, middle, steps=8)
    page.mouse.up()
    whole = page.get_by_role("button", name="all of it")
    whole.wait_for()
    low, high = map(float, parse_qs(page.evaluate("location.hash.split('?')[1]"))["zoom"][0].split(","))
    assert low < 0.1 and 0.5 < high < 1.5
    whole.click()
    page.wait_for_function("!location.hash.includes('zoom')")
    for axis, spent in (("tokens", "32"), ("seconds", "2")):  # in step 0: 10 + 20 + 2 tokens, 1.5 + 0.5 s
        page.get_by_role("button", name=axis, exact=True).click()
        charts[0].locator(".u-over").wait_for()
        page.mouse.move(left + 3, middle)
        page.mouse.move(left, middle)
        sync_api.expect(charts[1].locator(".at")).to_have_text(f"{axis} {spent}", timeout=WAIT_MS)
        page.wait_for_url(f"**x={axis}*")


def test_the_table_filters_searches_sorts_and_opens_by_keys(page: Any, address: str) -> None:
    page.goto(f"{address}#/rollouts?q=part%3Dtrain-1")
    page.wait_for_selector(".space .row a")
    assert page.locator(".space .row").count() == 4
    page.keyboard.press("/")
    page.keyboard.type(" notes")
    sync_api.expect(page.locator(".space .row")).to_have_count(1, timeout=WAIT_MS)
    sync_api.expect(page.locator(".snippet mark").first).to_have_text("Notes", timeout=WAIT_MS)
    page.wait_for_url("**q=part%3Dtrain-1+notes*")
    page.goto(f"{address}#/rollouts?q=part%3Dtrain-1&sort=reward&order=desc")
    sync_api.expect(page.locator(".heads [aria-sort=descending]")).to_contain_text("reward", timeout=WAIT_MS)
    sync_api.expect(page.locator(".space .row")).to_have_count(4, timeout=WAIT_MS)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector(".talk .block")
    page.wait_for_url("**row=2*")  # reward 0.5 is the second
    sync_api.expect(page.locator("h1")).to_have_text("b", timeout=WAIT_MS)
    page.keyboard.press("]")
    page.wait_for_url("**row=1*")
    sync_api.expect(page.locator("h1")).to_have_text("a", timeout=WAIT_MS)
    page.keyboard.press("s")
    page.wait_for_selector(".column")
    assert page.locator(".column header h2").all_inner_texts() == ["sample 0", "sample 1"]


def test_tokens_carry_the_numbers_that_are_on_record(page: Any, address: str) -> None:
    page.goto(f"{address}#/rollout?run=echo_seed1&part=train-1&row=1")
    page.wait_for_selector(".talk .block")
    wait_for_text(page, ".facts-row", "advantage -1.5")
    sync_api.expect(page.locator(".call-tool").first).to_have_text("bash", timeout=WAIT_MS)
    sync_api.expect(page.locator(".call pre").first).to_have_text("ls", timeout=WAIT_MS)
    page.keyboard.press("t")
    page.wait_for_selector(".token")
    whole = A.trajectories[1]
    page.evaluate("document.getElementById('main').scrollTop = 1e6")  # blocks get their tokens as they come near
    sync_api.expect(page.locator(".token")).to_have_count(len(whole), timeout=WAIT_MS)
    action = next(start for start, _, segment in whole.spans() if segment.role.name == "ACTION")
    page.locator(".token").nth(action + 2).click()
    which = f"id {encode('<bash>ls</bash><|im_end|>')[2]} "
    wait_for_text(page, ".token-numbers", which, "ACTION", "logprob -0.5 ", "policy weight -0.75", "world weight 0")
    page.wait_for_url(f"**pos={action + 2}*")
    page.keyboard.press("ArrowLeft")
    wait_for_text(page, ".token-numbers", "logprob -0.25 ")
    output = next(start for start, _, segment in whole.spans() if segment.role.name == "ENV_OUTPUT")
    page.goto(f"{address}#/rollout?run=echo_seed1&part=train-1&row=1&tokens=1&pos={output}")
    sync_api.expect(page.locator(".token-numbers")).to_contain_text("world weight +0.125", timeout=WAIT_MS)


def test_a_token_tells_what_each_checkpoint_made_of_it(page: Any, address: str) -> None:
    first = A.trajectories[1].roles.index(TokenRole.ENV_OUTPUT)
    page.goto(f"{address}#/rollout?run=echo_seed1&part=train-1&row=1")
    page.wait_for_selector(".surprises li")
    wait_for_text(page, ".surprises li", "6 nats; before 2", "expected")
    page.locator(".surprises button").first.click()
    sync_api.expect(page.locator(".token-numbers")).to_contain_text("cross-entropy 6 nats (0.248 %)", timeout=WAIT_MS)
    wait_for_text(page, ".token-numbers", "before cross-entropy 2 nats (13.5 %)", '77.9 %, "x" 1.83 %')
    page.wait_for_url(f"**pos={first}*")
    page.keyboard.press("b")
    page.wait_for_selector(".sides .token.pinned")
    assert page.locator(".token.pinned").count() == 2
    shade = "getComputedStyle(document.querySelectorAll('.token.pinned')[{}]).getPropertyValue('--strength')"
    assert [page.evaluate(shade.format(side)) for side in (0, 1)] == ["40", "100"]  # 2 of 5 nats, and more than 5


def test_the_world_model_page_compares_checkpoints_and_leads_to_the_token(page: Any, address: str) -> None:
    page.goto(f"{address}#/world")
    page.wait_for_selector(".kinds")
    wait_for_text(page, ".kinds tbody tr", "bash new", "2")
    worse = page.locator(".pair section").nth(1).locator("li")
    assert worse.count() == 4 and "-4 nats: cross-entropy 2, then 6" in worse.first.inner_text().replace("\u2212", "-")
    worse.first.locator("a").click()
    sync_api.expect(page.locator(".token-numbers")).to_contain_text("cross-entropy 6 nats", timeout=WAIT_MS)


IS_READ = """([q, sort, sorted]) => {
    const [input, head] = [document.querySelector(".filter input"), document.querySelector(`.cell-${sort}`)];
    const isAsked = input?.value === q && head?.ariaSort === sorted;
    return isAsked && document.querySelector(".scroller").ariaBusy === "false";
}"""


def rows_of(page: Any, address: str, q: str, sort: str, order: str) -> list[str]:
    """Return the links of the table's rows, once all files are read."""
    page.goto(f"{address}#/rollouts?{urlencode({'q': q, 'sort': sort, 'order': order})}")
    page.wait_for_function(IS_READ, arg=[q, sort, f"{order}ending"])
    return page.eval_on_selector_all(".space .row .cell-task a", "links => links.map((a) => a.getAttribute('href'))")


QUERIES = (
    "", "reward<1", "failed step:1", "advantage:-2..0 step:1,7", "turns>1 kind!=eval", "surprise!=2", "task:a",
    "step:1..", '"total 3"', "notes kind:train", "nowhere", "failure:sandbox",
)  # fmt: skip


def test_one_file_holds_the_page_and_answers_as_the_server_does(
    page: Any, address: str, run: Path, tmp_path: Path
) -> None:
    file = write_page([run], tmp_path / "page.html").as_uri()
    asked = [(q, sort, order) for q in QUERIES for sort, order in (("step", "desc"), ("reward", "asc"))]
    answers = [rows_of(page, address, *each) for each in asked]
    assert len(set(map(tuple, answers))) > len(QUERIES)
    page.goto(f"{file}#/rollouts?q=surprise%3E0&sort=surprise&order=desc")
    sync_api.expect(page.locator(".space .row")).to_have_count(4, timeout=WAIT_MS)
    assert [rows_of(page, file, *each) for each in asked] == answers
    page.goto(f"{file}#/rollout?run=echo_seed1&part=train-1&row=1&tokens=1")
    page.wait_for_selector(".surprises li")
    page.locator(".surprises button").first.click()
    sync_api.expect(page.locator(".token-numbers")).to_contain_text("cross-entropy 6 nats", timeout=WAIT_MS)
    page.goto(f"{file}#/rollout?run=echo_seed1&part=train-0&row=1")
    sync_api.expect(page.locator(".screen").first).to_contain_text("<script>alert(1)</script>", timeout=WAIT_MS)
    page.goto(f"{file}#/overview?find=reward")
    page.wait_for_selector("[data-name=reward] canvas")
    with page.expect_download() as saved:
        page.goto(f"{file}#/rollout?run=echo_seed1&part=train-1&row=1")
        page.wait_for_selector(".talk .block")
        page.keyboard.press("x")
    saved.value.save_as(tmp_path / "case.jsonl")
    assert read_trajectories(tmp_path / "case.jsonl") == [A.trajectories[1]]


def test_hostile_text_is_shown_and_runs_nothing(page: Any, address: str) -> None:
    page.goto(f"{address}#/rollout?run=echo_seed1&part=train-0&row=1")
    page.wait_for_selector(".talk .block")
    wait_for_text(page, ".screen", "red <script>alert(1)</script> U+202EevilU+202C")
    assert page.locator(".screen .fg1").first.inner_text() == "red"
    assert page.locator("main script").count() == 0
    page.keyboard.press("r")
    wait_for_text(page, ".screen", "^[[31mred^[[0m")
    page.goto(f"{address}#/rollout?run=echo_seed1&part=train-0&row=3")
    page.wait_for_selector(".failure")
    wait_for_text(page, ".failure", "bwrap <b>died</b>")
    page.locator(".failure summary").click()
    sync_api.expect(page.locator(".failure details pre")).to_have_text(TRACEBACK, timeout=WAIT_MS)


def test_a_study_of_five_arms_and_five_seeds_shows_its_arms_together(page: Any, tmp_path: Path) -> None:
    with served(write_study(tmp_path / "five")) as address:
        page.goto(f"{address}#/overview?arms=1&find=pass_at_1")
        page.wait_for_selector("[data-name='held-out pass_at_1'] canvas")
        readings = page.locator("[data-name='held-out pass_at_1'] .reading")
        sync_api.expect(readings).to_have_count(len(ARMS), timeout=WAIT_MS)  # arms are drawn as their runs are read
        said = [" ".join(text.split()) for text in readings.all_inner_texts()]
        assert said == [f"{arm} 0.5 [0.5, 0.5]" for arm in sorted(ARMS)]
        assert page.locator(".readings").first.evaluate("(all) => all.scrollHeight <= all.clientHeight")
        assert page.locator(".source").count() == 25
        results = page.locator("table.kinds").first.locator("tbody tr")
        results.first.wait_for()
        assert results.first.inner_text().split("\t")[:4] == [
            "pass@1",
            "grpo",
            "25 % [25 %, 25 %]",
            "50 % [50 %, 50 %]",
        ]
        differ = page.locator("table.settings").first.locator("th[scope=row]").all_inner_texts()
        assert {"seed", "objective.world_model_coeff", "objective.world.observations"} <= set(differ)
        page.goto(f"{address}#/world")
        page.wait_for_selector(".probe")
        apart = page.locator(".probe").first.locator("tbody tr")
        rows = [row.split("\t") for row in apart.all_inner_texts()]
        told = {arm: [text.strip() for text in cells] for arm, *cells in rows}
        assert told["grpo"][:3] == ["0 of 5 seeds", "1", "0.5"] and told["echo"][:3] == ["5 of 5 seeds", "1", "1.5"]
        assert told["before training"][3] == "no idea" and told["matched"][3] == "total 12"
        assert "0 % → 100 %" in (page.locator("table.kinds tr", has_text="echo_seed0").first.text_content() or "")
        links = rows_of(page, address, "reward=1 step:1", "step", "desc")
        assert len(links) >= 20 and "run=action_masked_seed0" in links[0]
        wait_for_text(page, ".summary", "25 rollouts")
        assert text_of(page, ".space .cell-run") == "action_masked_seed0"
        page.goto("about:blank")  # before the server ends


def test_branches_leaked_tokens_and_dreams_are_shown(page: Any, tmp_path: Path) -> None:
    log = RunLog(write_run(tmp_path / "odd"))
    wrong, weights = leaking()
    group = TrajectoryGroup("a", (wrong, forked()))
    log.write_groups(2, [group])
    log.write_weights(2, [group], [weights, weigh(forked(), -1.0)])
    log.write_dream({"step": 2, "command": "$ ls", "expected": "notes.txt", "actual": "total 12", "ce": 1.5})
    with served(tmp_path) as address:
        page.goto(f"{address}#/rollout?run=odd&part=train-2&row=0")
        page.wait_for_selector(".findings li")
        found = page.locator(".findings li").all_inner_texts()
        assert [text.split(" ", 2)[:2] for text in found].count(["2", "tokens"]) == 1 and len(found) == 3
        page.locator(".findings button").first.click()
        page.wait_for_selector(".token.pinned")
        page.goto(f"{address}#/rollout?run=odd&part=train-2&row=1")
        sync_api.expect(page.locator("[role=separator]")).to_contain_text("branch 1", timeout=WAIT_MS)
        wait_for_text(page, ".talk", "total 3")
        wait_for_text(page, ".facts, .facts-row", "branches 2")
        page.goto(f"{address}#/world")
        dream = page.locator(".probe", has_text="$ ls")
        sync_api.expect(dream).to_contain_text("1.5 nats a token", timeout=WAIT_MS)
        assert [part in dream.inner_text() for part in ("notes.txt", "total 12")] == [True, True]
        page.goto("about:blank")  # before the server ends


VERIFIERS = ("traces.jsonl", "results.jsonl")  # token ids, and messages
OPENENV = ("episode.json", "training_trace.json")


def test_a_folder_of_others_trajectories_opens_as_it_is(page: Any, tmp_path: Path) -> None:
    with served(write_foreign(tmp_path / "theirs"), "--model", "base") as address:
        urlopen(f"{address}api/rollouts", timeout=600).close()  # loads what reads them, which takes its time
        links = rows_of(page, address, "", "task", "asc")
        runs = {link.partition("run=")[2].partition("&")[0] for link in links}
        theirs = {"harbor.jsonl", "inspect.json", "chat.jsonl", *VERIFIERS, *OPENENV}
        assert runs == theirs | {"trl.json"} and len(links) == 13
        assert text_of(page, ".notice summary") == "1 record could not be read"  # its two turns follow no chat template
        for name in sorted(theirs):
            page.goto(f"{address}#/rollout?run={name}&part=file&row=0")
            sync_api.expect(page.locator(".crumbs")).to_contain_text(name, timeout=WAIT_MS)
            wait_for_text(page, ".block-context", "count the lines")
            wait_for_text(page, ".talk", "total 12")
        page.goto("about:blank")  # before the server ends


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, address: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    rollout = "rollout?run=echo_seed1&part=train-1&row=1&"
    group = "group?run=echo_seed1&part=train-0&group=0"
    for place in ("overview", "rollouts?q=total", "world", rollout, f"{rollout}tokens=1&sides=1&pos=40", group):
        page.goto(f"{address}#/{place}")
        page.wait_for_selector(".readings, .space .row a, .token, .kinds, .talk .block")
        found = Axe().run(page).response["violations"]
        serious = [
            (rule["id"], node["target"], node["failureSummary"])
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"][:3]
        ]
        assert serious == [], place
    context.close()


@pytest.mark.parametrize(
    "place", ["overview", "rollouts", "world", "rollout?run=echo_seed1&part=train-0&row=1&tokens=1"]
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    browser: Any, address: str, place: str, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{address}#/{place}")
    page.wait_for_selector(".readings, .space .row a, .token, .kinds")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.getElementById('main').scrollWidth") <= 390
    context.close()


def test_a_task_called_like_a_path_and_a_line_of_five_megabytes_do_no_harm(page: Any, run: Path, address: str) -> None:
    log = RunLog(run.parent / "hostile")
    log.write_config(RunLog(run).read_config())
    shutil.copytree(RunLog(run).tokenizer_path, log.tokenizer_path)
    line = "\ud800<img src=x onerror=alert(1)>" + "A" * 5_000_000
    failed = replace(B.trajectories[1], task_id="../../x", failure=Failure("step", "SandboxError", line))
    log.write_groups(0, [TrajectoryGroup("../../x", (failed,))])
    page.goto(f"{address}#/rollouts?q=failure:sandboxerror+task:..%2F..%2Fx")
    page.locator(".space .row a").first.click()
    sync_api.expect(page.locator(".failure pre")).to_contain_text("<img src=x onerror=alert(1)>AAAA", timeout=WAIT_MS)
    wait_for_text(page, ".failure pre", "U+D800")
    wait_for_text(page, ".failure .more", "more characters")
    with page.expect_download() as saved:
        page.keyboard.press("x")
    assert saved.value.suggested_filename == "_.._x-train-0-1.jsonl"
