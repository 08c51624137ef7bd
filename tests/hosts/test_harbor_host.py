"""Harbor both ways: its runner, agents and verifier over our sandbox, and its environments under our rollouts.

Needs Python 3.12 and Harbor, but no torch: `scripts/harbor test` makes such an environment and runs this file in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from backtalk.errors import ConfigError, SandboxError, SandboxUnavailable, TaskError, VerifierError
from backtalk.sandboxes.base import SandboxFile, SandboxLimits
from backtalk.sandboxes.bubblewrap.backend import BubblewrapBackend

pytest.importorskip("harbor", reason="Harbor is not installed here; `scripts/harbor test` runs these tests")

# Harbor itself speaks of what it will remove.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning")

OURS = "backtalk.hosts.harbor:BacktalkEnvironment"
ASSETS = Path(__file__).parents[2] / "src/backtalk/assets/tasks"
DOCKERFILE = """\
FROM python:3.11-slim-bookworm
ENV GREETING=hello
WORKDIR /app
COPY data/ /app/data/
RUN wc -l < data/lines.txt > counted.txt
"""
TEST_SH = """\
#!/bin/bash
if [ "$(cat /app/answer.txt)" = 3 ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""


@pytest.fixture(scope="module", autouse=True)
def _needs_a_sandbox() -> None:
    try:
        BubblewrapBackend()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def write_task(folder: Path, *, environment: str = 'network_mode = "no-network"', **files: str) -> Path:
    """Count the lines of a file: a task folder as a person writes one, and ``files`` by their path instead."""
    whole = {
        "task.toml": f'schema_version = "1.4"\n[task]\nname = "org/{folder.name}"\n[environment]\n{environment}\n',
        "instruction.md": "How many lines has data/lines.txt? Write the number to answer.txt.\n",
        "environment/Dockerfile": DOCKERFILE,
        "environment/data/lines.txt": "a\nb\nc\n",
        "tests/test.sh": TEST_SH,
        "solution/solve.sh": '#!/bin/bash\ncp counted.txt answer.txt\n[ "$GREETING" = hello ]\n',
    }
    for name, content in (whole | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


@asynccontextmanager
async def environment(task: Path, folder: Path, **options: Any) -> AsyncIterator[Any]:
    """Our environment of a task, started as a trial of Harbor's starts it."""
    inner = make(task, folder, **options)
    try:
        await inner.start(force_build=False)
        yield inner
    finally:
        await inner.stop(delete=True)


def make(task: Path, folder: Path, **options: Any) -> Any:
    from harbor.environments.factory import EnvironmentFactory
    from harbor.models.task.task import Task
    from harbor.models.trial.paths import TrialPaths

    read, paths = Task(task), TrialPaths(folder / "trial")
    paths.mkdir()
    config = read.config.environment
    return EnvironmentFactory.create_environment_from_import_path(
        OURS,
        environment_dir=read.paths.environment_dir,
        environment_name=read.short_name,
        session_id="test__env",
        trial_paths=paths,
        task_env_config=config,
        **{"network_policy": config.resolve_baseline()} | options,
    )


# harbor run


def harbor_run(source: Path, agent: str, jobs: Path, *options: str) -> tuple[dict[str, Any], str]:
    """`harbor run` as a person types it: for each task its reward, or the class of its exception; and what it said."""
    command = [str(Path(sys.executable).parent / "harbor"), "run", "-p", str(source), "-a", agent, "--env", OURS]
    command += ["--jobs-dir", str(jobs), "--quiet", "--yes", *options]
    env = {**os.environ, "HARBOR_TELEMETRY": "0", "COLUMNS": "400"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    found: dict[str, Any] = {}
    for path in jobs.glob("*/*/result.json"):
        result = json.loads(path.read_text())
        error, scored = result["exception_info"], result["verifier_result"]
        found[result["task_name"]] = error["exception_type"] if error else scored["rewards"]["reward"]
    return found, run.stdout + run.stderr


def test_the_oracle_earns_every_reward_and_doing_nothing_none(tmp_path: Path) -> None:
    from backtalk.tasks.folder import write_harbor_task
    from backtalk.tasks.load import load_tasks
    from backtalk.tasks.task import Split

    source = tmp_path / "tasks"
    for task in load_tasks("triage", split=Split.HELD_OUT, count=4, levels=(1, 2, 3)):
        write_harbor_task(task, source / task.id.replace("/", "-"))
    write_task(source / "count-lines")
    for path in sorted(ASSETS.glob("*/*/task.toml")):
        shutil.copytree(path.parent, source / path.parent.name)
    count = len(list(source.iterdir()))
    oracle, said = harbor_run(source, "oracle", tmp_path / "oracle")
    assert len(oracle) == count and set(oracle.values()) == {1.0}, (oracle, said)
    nothing, said = harbor_run(source, "nop", tmp_path / "nop")
    assert len(nothing) == count and set(nothing.values()) == {0.0}, (nothing, said)


def test_a_task_of_the_public_network_is_refused_or_runs_offline(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "public", environment="")
    refused, said = harbor_run(folder, "oracle", tmp_path / "refused")
    assert not refused and "asks for the public network" in said, said
    offline, said = harbor_run(folder, "oracle", tmp_path / "offline", "--ek", "offline=true")
    assert offline == {"org/public": 1.0}, said


# our environment under Harbor


async def test_commands_run_as_harbor_asks(tmp_path: Path) -> None:
    task = write_task(
        tmp_path / "t", environment='network_mode = "no-network"\nmemory_mb = 64\n[environment.env]\nB = "${B:-two}"'
    )
    async with environment(task, tmp_path, persistent_env={"C": "three"}) as env:
        result = await env.exec("pwd; echo $GREETING $B $C $D; echo err >&2; cat counted.txt; exit 3", env={"D": "4"})
        assert (result.stdout, result.stderr, result.return_code) == ("/app\nhello two three 4\nerr\n3\n", None, 3)
        assert (await env.exec("export X=1; cd /; A=2")).return_code == 0
        assert (await env.exec("echo [$X$A$D] $PWD")).stdout == "[] /app\n"  # each in a shell of its own
        assert (await env.exec("pwd", cwd="/logs/agent")).stdout == "/logs/agent\n"
        assert (await env.exec("id -u", user="root")).stdout == (await env.exec("id -u")).stdout
        with pytest.raises(ValueError, match="one ordinary user"):
            await env.exec("id", user="postgres")
        with env.scoped_exec_env({"D": "scoped"}):
            assert (await env.exec("echo $D", env={"D": "own"})).stdout == "scoped\n"
        await env.exec("python3 -m http.server 8123 --bind 127.0.0.1 >/dev/null 2>&1 & sleep 0.5")
        assert "lines.txt" in (await env.exec("curl -s http://127.0.0.1:8123/data/ || ls data")).stdout
        greedy = "python3 -c 'print(len(bytearray(200 << 20)))'"
        assert (await env.exec(greedy)).return_code != 0  # 64 MB is all there is


async def test_a_time_limit_ends_what_the_command_started(tmp_path: Path) -> None:
    async with environment(write_task(tmp_path / "t"), tmp_path) as env:
        with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
            await env.exec("sleep 4711 & sleep 4711", timeout_sec=1)
        assert (await env.exec("pgrep -c sleep")).stdout == "0\n"
        waiting = asyncio.create_task(env.exec("sleep 4711"))
        await asyncio.sleep(0.2)
        waiting.cancel()  # Harbor does so when an agent's time is over
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await env.exec("pgrep -c sleep; echo fine")).stdout == "0\nfine\n"


async def test_files_go_in_and_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/run.sh").write_text("echo ran\n")
    (folder / "deep/run.sh").chmod(0o755)
    (folder / "odd name\n").write_bytes(bytes(range(256)) * 5000)
    async with environment(write_task(tmp_path / "t"), tmp_path) as env:
        await env.upload_dir(folder, "/new/place")
        assert (await env.exec("/new/place/deep/run.sh")).stdout == "ran\n"
        await env.upload_file(folder / "deep/run.sh", "/app/data/x/y.sh")
        assert await env.is_file("/app/data/x/y.sh") and await env.is_dir("/app/data/x")
        await env.exec("ln -s /etc/passwd /new/place/link; mkfifo /new/place/pipe; chmod 000 /new/place/deep/run.sh")
        await env.download_dir("/new/place", tmp_path / "out")
        names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
        assert names == ["odd name\n"]  # no link, no pipe, nothing that cannot be read
        assert (tmp_path / "out/odd name\n").read_bytes() == bytes(range(256)) * 5000
        await env.download_dir_filtered(source_dir="/app", target_dir=tmp_path / "some", include=["data/*"])
        assert (tmp_path / "some/data/lines.txt").read_text() == "a\nb\nc\n" and not (
            tmp_path / "some/counted.txt"
        ).exists()
        for missing in (env.download_file("/new/none", tmp_path / "n"), env.download_dir("/none", tmp_path / "n")):
            with pytest.raises(FileNotFoundError):
                await missing


def processes_with(text: str) -> int:
    return sum(text.encode() in read(path) for path in Path("/proc").glob("[0-9]*/cmdline"))


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_nothing_is_left_after_stop_or_a_start_that_failed(tmp_path: Path) -> None:
    env = make(write_task(tmp_path / "t"), tmp_path)
    await env.start(force_build=True)
    await env.exec("sleep 918273 & sleep 0.1")
    assert processes_with("918273") > 0
    await env.stop(delete=False)
    await env.stop(delete=True)
    with pytest.raises(SandboxError, match="is not started"):
        await env.exec("true")
    broken = write_task(tmp_path / "b", **{"environment/Dockerfile": "FROM x\nRUN sleep 918273 & sleep 0.1; false\n"})
    env = make(broken, tmp_path / "b")
    with pytest.raises(SandboxError, match="exited 1"):
        await env.start(force_build=False)
    until_s = time.monotonic() + 5
    while processes_with("918273") and time.monotonic() < until_s:
        await asyncio.sleep(0.05)
    assert processes_with("918273") == 0


@pytest.mark.parametrize(
    ("settings", "files", "options", "error", "message"),
    [
        ("", {}, {}, ValueError, "offline=true"),
        ('network_mode = "allowlist"\nallowed_hosts = ["pypi.org"]', {}, {}, ValueError, "allowlist"),
        ("gpus = 1", {}, {"offline": True}, RuntimeError, "GPU"),
        (None, {"environment/Dockerfile": "FROM x\nRUN pip install y\n"}, {}, TaskError, "line 2.*network"),
        (None, {"environment/docker-compose.yaml": "services: {}\n"}, {}, TaskError, "several machines"),
        (
            None,
            {},
            {"mounts": [{"type": "bind", "source": "/", "target": "/host"}]},
            ValueError,
            "files of this machine",
        ),
        (None, {}, {"cpu_enforcement_policy": "limit"}, ValueError, "CPU resource limits"),
        (None, {}, {"stream": True}, ValueError, "stream"),
    ],
)
def test_what_a_sandbox_has_not_got_is_refused(
    tmp_path: Path, settings: str | None, files: dict[str, str], options: Any, error: type[Exception], message: str
) -> None:
    task = write_task(tmp_path / "t", **({} if settings is None else {"environment": settings}), **files)
    with pytest.raises(error, match=message):
        make(task, tmp_path, **options)


def test_an_image_alone_is_refused_unless_this_machine_may_stand_in(tmp_path: Path) -> None:
    task = write_task(tmp_path / "t", environment='network_mode = "no-network"\ndocker_image = "a/b:1"')
    (task / "environment/Dockerfile").unlink()
    with pytest.raises(TaskError, match="ready-made image 'a/b:1'"):
        make(task, tmp_path)
    make(task, tmp_path, host_packages=True)


# Harbor's environments under our rollouts


@cache
def backend() -> Any:
    from backtalk.sandboxes.harbor.backend import HarborBackend

    return HarborBackend(OURS, kwargs={"host_packages": True})


# What a Harbor environment cannot show: there are no jobs of an earlier shell.
NOT_HERE = {"background_jobs"}


async def test_a_session_is_carried_over_a_harbor_environment() -> None:
    from backtalk.sandboxes.conformance import CHECKS, Category, conformance

    chosen = {check.name for check in CHECKS if check.category is Category.BEHAVIOUR}
    results = await conformance(backend(), only=chosen)
    failed = {result.check.name: result.reason for result in results if result.outcome.value == "failed"}
    assert set(failed) == NOT_HERE, failed


async def test_what_a_command_leaves_is_met_by_the_next() -> None:
    async with backend().open(SandboxLimits()) as sandbox:

        async def out(command: str, **options: Any) -> str:
            return (await sandbox.exec(command, **{"timeout_s": 20.0} | options)).output

        assert await out("cd /tmp; export A='x y'; b=(1 2); f() { echo f$1; }; pwd") == "/tmp\n"
        assert await out('pwd; echo "$A" ${b[1]}; f 3', cwd="/usr") == "/usr\nx y 2\nf3\n"
        assert await out("echo $V", env={"V": "once"}) + await out("echo [$V]") == "once\n[]\n"
        assert (await sandbox.exec("cd /; exit 4", timeout_s=20)).exit_code == 4
        assert await out("pwd") == "/usr\n"  # as before the command that ended the shell
        await out("sleep 4711 & echo $! >/tmp/job")
        assert await out("kill -0 $(</tmp/job) && echo lives") == "lives\n"
        long = await sandbox.exec("setsid sleep 4711 & sleep 4711", timeout_s=1)
        assert (long.timed_out, long.exit_code) == (True, -1)
        assert await out("pgrep -c sleep") == "1\n"  # the one of before
        await sandbox.restart()
        assert await out("pwd; echo [$A]; pgrep -c sleep") == "/home/agent\n[]\n0\n"
        await sandbox.put({"/app/x": SandboxFile(b"\0\xff", mode=0o600, mtime=86_400)})
        assert await out("stat -c '%a %Y' /app/x") == "600 86400\n"
        assert await sandbox.get("/app/x") == b"\0\xff" and await sandbox.get("/app/y") is None


async def test_a_task_of_ours_is_played_and_scored_in_a_harbor_environment() -> None:
    from backtalk.envs.terminal import TerminalConfig, open_terminal_env
    from backtalk.messages import ToolCall
    from backtalk.tasks.load import load_tasks
    from backtalk.tasks.task import Split

    task = load_tasks("triage", split=Split.HELD_OUT, count=1, levels=(2,))[0]
    for answer, reward in ((str(task.metadata["answer"]), 1.0), ("wrong", 0.0)):
        async with open_terminal_env(task, backend(), TerminalConfig()) as env:
            await env.reset()
            step = await env.step(ToolCall("bash", {"command": "pwd; ls /srv | head -1"}))
            assert step.messages[0].text.startswith(task.workdir)
            await env.step(ToolCall("submit", {"answer": answer}))
            assert await env.score() == reward


async def test_a_dataset_is_played_in_its_own_environment_and_scored_by_harbor(tmp_path: Path) -> None:
    from backtalk.envs.harbor import HarborWorld, load_harbor_dataset
    from backtalk.messages import ToolCall

    for name in ("b", "a"):
        write_task(tmp_path / "set" / name)
    assert [task.id for task in await load_harbor_dataset(str(tmp_path / "set"))] == ["org/a", "org/b"]
    (task,) = await load_harbor_dataset(str(tmp_path / "set"), names=["b"])
    for command, reward in (("cp counted.txt answer.txt", 1.0), ("echo 4 > answer.txt", 0.0)):
        async with HarborWorld(OURS).open(task) as env:
            messages = await env.reset()
            assert messages[1].text.startswith("How many lines")
            step = await env.step(ToolCall("bash", {"command": f"{command}; pwd; echo $GREETING"}))
            assert step.messages[0].text == "/app\nhello\n"
            assert await env.score() == reward
    silent = write_task(tmp_path / "silent", **{"tests/test.sh": "#!/bin/bash\ntrue\n"})
    (task,) = await load_harbor_dataset(str(silent))
    async with HarborWorld(OURS).open(task) as env:
        await env.reset()
        with pytest.raises(VerifierError, match="RewardFileNotFoundError"):
            await env.score()


async def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    from backtalk.envs.harbor import load_harbor_dataset
    from backtalk.sandboxes.harbor.backend import HarborBackend

    with pytest.raises(ConfigError, match=r"no environment 'dokcer'.*daytona"):
        HarborBackend("dokcer")
    with pytest.raises(SandboxUnavailable, match=r"nobody\.knows"):
        HarborBackend("nobody.knows:This")
    with pytest.raises(SandboxError, match=r"did not start: .*ready-made image"):
        async with HarborBackend(OURS).open(SandboxLimits()):
            pass
    with pytest.raises(ConfigError, match="Harbor has no tasks"):
        await load_harbor_dataset(str(tmp_path), names=["x"])


# ATIF, telemetry, weight


def test_harbors_own_model_takes_our_trajectories() -> None:
    from harbor.models.trajectories import Trajectory as HarborTrajectory

    from backtalk.envs.terminal import BASH, SUBMIT
    from backtalk.exchange.write.atif import to_atif
    from backtalk.messages import ToolCall
    from backtalk.trajectory import Segment, TokenRole, Trajectory

    trajectory = Trajectory(
        task_id="t",
        sample_index=0,
        segments=(
            Segment(TokenRole.CONTEXT, (1, 2)),
            Segment(TokenRole.ACTION, (3, 4), (-0.5, -0.25), turn=0),
            Segment(TokenRole.ENV_OUTPUT, (5,), turn=0, tool="bash"),
        ),
        messages=(
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "ls"},
            {"role": "tool", "content": "f", "tool": "bash"},
        ),
        reward=1.0,
    )
    calls = [ToolCall("bash", {"command": "ls"})]
    document = to_atif(trajectory, model_name="m", tools=[BASH, SUBMIT], calls_of=lambda ids: calls)
    read = HarborTrajectory.model_validate(document)
    assert read.to_json_dict() == document
    step = read.steps[1]
    assert step.metrics.prompt_token_ids == [1, 2] and step.metrics.logprobs == [-0.5, -0.25]
    assert step.observation.results[0].source_call_id == step.tool_calls[0].tool_call_id


def test_neither_torch_nor_telemetry_comes_with_it() -> None:
    code = (
        "import os, sys, backtalk.hosts.harbor, backtalk.sandboxes.harbor.backend, backtalk.envs.harbor\n"
        "print(os.environ['HARBOR_TELEMETRY'], 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    for given, expected in (({}, "0"), ({"HARBOR_TELEMETRY": "1"}, "1")):
        env = {name: value for name, value in os.environ.items() if name != "HARBOR_TELEMETRY"} | given
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
        assert run.stdout.split() == [expected, "False", "False"], run.stderr
