"""Task folders as other people write them: each runs here, or is refused with the reason and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from backtalk.errors import TaskError
from backtalk.messages import ToolCall
from backtalk.run.config import config_from_dict
from backtalk.run.worlds import open_worlds
from backtalk.sandboxes.root import Root
from backtalk.tasks.folder import load_harbor_tasks, read_harbor_task, write_harbor_task
from backtalk.tasks.load import read_tasks
from backtalk.tasks.modules import find_test_commands, find_test_modules, find_unexplained_modules
from backtalk.tasks.needs import missing_tools
from backtalk.tasks.scripts import find_test_programs, make_script_offline
from backtalk.tasks.task import Split
from sandbox_help import backend_or_skip

OLD_TOML = """\
version = "1.0"

[metadata]
author_name = "Somebody"
difficulty = "easy"
tags = ["files"]

[verifier]
timeout_sec = 120.0

[agent]
timeout_sec = 900.0

[environment]
build_timeout_sec = 600.0
docker_image = "somebody/hello:20251031"
cpus = 1
memory = "2G"
storage = "10G"
allow_internet = true
"""
# As the tasks of Terminal-Bench 2 score themselves.
UVX = """\
#!/bin/bash

# Install curl
apt-get update
apt-get install -y curl

# Install uv
curl -LsSf https://astral.sh/uv/0.9.5/install.sh | sh

source $HOME/.local/bin/env

if [ "$PWD" = "/" ]; then
    echo "Error: No working directory set."
    exit 1
fi

uvx \\
  -p 3.13 \\
  -w pytest==8.4.1 \\
  -w pytest-json-ctrf==0.3.5 \\
  pytest --ctrf /logs/verifier/ctrf.json /tests/test_outputs.py -rA

if [ $? -eq 0 ]; then
  echo 1 > /logs/verifier/reward.txt
else
  echo 0 > /logs/verifier/reward.txt
fi
"""
OUTPUTS = """\
from pathlib import Path


def test_hello():
    assert Path("/app/hello.txt").read_text() == "Hello\\n"
"""
DOCKERFILE = """\
FROM ghcr.io/somebody/t-bench/ubuntu-24-04:20250624
WORKDIR /app
RUN <<EOF
mkdir -p notes
echo one > notes/a
EOF
RUN cat <<'TXT' > notes/b
two $PWD
TXT
COPY data.csv ./
"""


def folder_of(place: Path, files: dict[str, str | None] | None = None) -> Path:
    """A task folder as Terminal-Bench 2 has them; ``files`` over it, None takes one out."""
    whole: dict[str, str | None] = {
        "task.toml": OLD_TOML,
        "instruction.md": "Write Hello to /app/hello.txt.\n",
        "environment/Dockerfile": DOCKERFILE,
        "environment/data.csv": "a,b\n",
        "tests/test.sh": UVX,
        "tests/test_outputs.py": OUTPUTS,
        "solution/solve.sh": "#!/bin/bash\necho Hello > /app/hello.txt\n",
        "README.md": "how this task came to be\n",
        "data/notes.bin": "left over",
        ".gitignore": "*.pyc\n",
    }
    for name, content in (whole | (files or {})).items():
        if content is not None:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return place


def script(text: str) -> str:
    """A test script as it is run where the machine has the packages."""
    return make_script_offline(Path("tests/test.sh"), text.encode(), host_packages=True)[0].decode()


# The same with a test runner that every Python has.
UNITTEST = UVX.replace(
    "pytest --ctrf /logs/verifier/ctrf.json /tests/test_outputs.py -rA", "python /tests/test_outputs.py"
)
UNITTEST_OUTPUTS = """\
import unittest
from pathlib import Path


class Hello(unittest.TestCase):
    def test_hello(self):
        self.assertEqual(Path("/app/hello.txt").read_text(), "Hello\\n")


unittest.main()
"""


@pytest.mark.parametrize(
    ("tests", "outputs"), [(UVX, OUTPUTS), (UNITTEST, UNITTEST_OUTPUTS)], ids=["pytest", "unittest"]
)
async def test_a_task_that_installs_its_test_runner_runs_where_that_is_there(
    tmp_path: Path, tests: str, outputs: str
) -> None:
    folder = folder_of(tmp_path / "hello", {"tests/test.sh": tests, "tests/test_outputs.py": outputs})
    with pytest.raises(TaskError, match=r"test\.sh, line 4: 'apt-get update' needs the network.*host_packages"):
        read_harbor_task(folder)
    task = read_harbor_task(folder, host_packages=True)
    assert "allow_internet = True: runs offline all the same" in task.metadata["world_notes"]
    assert "memory = 2G, storage = 10G: the run's own limits hold" in task.metadata["world_notes"]
    assert task.metadata["base_image"] == "ghcr.io/somebody/t-bench/ubuntu-24-04:20250624"
    if missing := missing_tools(task):
        pytest.skip(f"this machine has no {missing}: apt install python3-pytest")
    for commands, reward in (((), 0.0), ((task.solution["solve.sh"].content.decode(),), 1.0)):
        async with open_terminal_env(task, backend_or_skip(), TerminalConfig()) as env:
            await env.reset()
            step = await env.step(ToolCall("bash", {"command": "cat notes/a notes/b data.csv"}))
            assert step.messages[0].text == "one\ntwo $PWD\na,b\n"
            for command in commands:
                await env.step(ToolCall("bash", {"command": command}))
            assert await env.score() == reward


def test_without_what_its_tests_import_it_is_left_out_and_named(tmp_path: Path) -> None:
    lines = (
        "uvx -w pytest==8 -w not_there_at_all>=2 pytest /tests/test_outputs.py\necho 1 > /logs/verifier/reward.txt\n"
    )
    folder_of(tmp_path / "a", {"tests/test.sh": lines, "tests/test_outputs.py": "import not_there_at_all, os\n"})
    folder_of(tmp_path / "b", {"tests/test.sh": "echo 1 > /logs/verifier/reward.txt\n"})
    said: list[str] = []
    tasks = read_tasks(str(tmp_path), host_packages=True, on_skip=said.append)
    assert [task.id for task in tasks] == ["b"]
    assert len(said) == 1 and "'a'" in said[0] and "python3:not_there_at_all" in said[0]
    again = read_harbor_task(tmp_path / "a", host_packages=True)
    write_harbor_task(again, tmp_path / "written")
    assert read_harbor_task(tmp_path / "written").metadata == again.metadata


async def test_a_run_reads_its_tasks_once_and_names_once_what_it_leaves_out(tmp_path: Path) -> None:
    lines = "uvx -w not_there_at_all pytest /tests/test_outputs.py\necho 1 > /logs/verifier/reward.txt\n"
    folder_of(tmp_path / "a", {"tests/test.sh": lines, "tests/test_outputs.py": "import not_there_at_all\n"})
    folder_of(tmp_path / "b", {"tests/test.sh": "echo 1 > /logs/verifier/reward.txt\n"})
    source = {"name": str(tmp_path), "host_packages": True}
    config = config_from_dict({"sandbox": "unsafe", "tasks": {"source": [source]}})
    notices: list[str] = []
    async with open_worlds(config, notices.append) as worlds:
        tasks = [task for split in Split for task in worlds.tasks(split, 9, 0)[0]]
    assert [task.id for task in tasks] == ["b"] and len(notices) == 1


PLAIN = "echo 1 > /logs/verifier/reward.txt\n"
DIFFERENT: dict[str, dict[str, str | None]] = {
    "the oldest schema": {"task.toml": OLD_TOML.replace('"1.0"', '"0.1"')},
    "a newer one than is known": {"task.toml": 'schema_version = "9.9"\n[new_section]\nkey = 1\n'},
    "a list of hosts": {"task.toml": '[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["pypi.org"]\n'},
    "no GPU": {"task.toml": "[environment]\ngpus = 0\n"},
    "root": {"task.toml": '[agent]\nuser = "root"\n'},
    "things to keep": {"task.toml": 'artifacts = ["/app/out"]\n[solution.env]\nKEY = "x"\n'},
    "a byte order mark": {"task.toml": "\ufeff" + OLD_TOML, "instruction.md": "\ufeffWrite Hello.\n"},
    "a service of its own": {"tests/test.sh": f"bash /app/s.sh &\ncurl -s http://localhost:8080/ | grep ok\n{PLAIN}"},
    "words about the network": {"tests/test.sh": f'grep -q "curl https://example.org" /app/get.sh && {PLAIN}'},
    "a virtual environment offline": {"tests/test.sh": f"python3 -m venv /tmp/v && . /tmp/v/bin/activate\n{PLAIN}"},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_different_and_runs_all_the_same(tmp_path: Path, what: str) -> None:
    files: dict[str, str | None] = {"tests/test.sh": PLAIN} | DIFFERENT[what]
    task = read_harbor_task(folder_of(tmp_path / "task", files))
    assert task.instruction.startswith("Write Hello")
    assert task.tests["test.sh"].content.decode() == files["tests/test.sh"]
    assert [path for path in task.files if path.endswith("/data.csv")] == list(task.files)
    assert set(task.tests) == {"test.sh", "test_outputs.py"}


REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "only an image": (
        {"environment/Dockerfile": None, "environment/data.csv": None},
        r"ready-made image.*write the Dock",
    ),
    "files that nothing copies": (
        {"environment/Dockerfile": None, "task.toml": ""},
        r"environment/data\.csv but no environment/Dockerfile.*write one",
    ),
    "several machines": (
        {"environment/docker-compose.yaml": "services: {main: {build: .}, db: {image: postgres}}\n"},
        r"several machines.*RUN lines",
    ),
    "several steps": (
        {"task.toml": '[[steps]]\nname = "a"\n', "instruction.md": None, "steps/a/instruction.md": "Do a.\n"},
        r"several \[\[steps\]\].*a task of its own",
    ),
    "a GPU": ({"task.toml": '[environment]\ngpus = 1\ngpu_types = ["H100"]\n'}, r"gpus = 1.*no GPU; set it to 0"),
    "another machine for the tests": (
        {"task.toml": '[verifier]\nenvironment_mode = "separate"\n'},
        r"environment_mode.*agent's sandbox.*take it out",
    ),
    "an image for the tests": ({"task.toml": '[verifier.environment]\ndocker_image = "a/b"\n'}, "agent's sandbox"),
    "a key of somebody": (
        {"task.toml": '[verifier.env]\nKEY = "${API_KEY}"\n'},
        r"put them under \[environment\.env\]",
    ),
    "tools": ({"task.toml": '[[environment.mcp_servers]]\nname = "x"\nurl = "http://mcp"\n'}, "bash and submit"),
    "another system": ({"task.toml": '[environment]\nos = "windows"\n'}, "a sandbox is Linux"),
    "another user": ({"task.toml": '[agent]\nuser = "bob"\n'}, "one ordinary user; leave it out"),
    "a watch": (
        {"task.toml": '[environment.healthcheck]\ncommand = "true"\n'},
        "start what it waits for in a RUN line",
    ),
    "line ends of Windows": ({"tests/test.sh": PLAIN.replace("\n", "\r\n")}, "line ends of Windows.*write LF"),
    "tests in Python": ({"tests/test.sh": "#!/usr/bin/env python3\nprint(1)\n"}, "is run by bash"),
    "no test script": ({"tests/test.sh": None}, r"has no tests/test\.sh"),
    "the older format": (
        {"task.toml": None, "instruction.md": None, "task.yaml": "instruction: Write Hello.\n"},
        r"older format of Terminal-Bench.*write task\.toml",
    ),
    "several stages": (
        {"environment/Dockerfile": "FROM a AS b\nRUN x\nFROM c\nCOPY --from=b /x /y\n"},
        "several stages",
    ),
    "a user of the image": ({"environment/Dockerfile": "FROM ubuntu\nUSER bob\n"}, "no line above makes the user"),
    "packages of the world": ({"environment/Dockerfile": "FROM a\nRUN apt-get install -y jq\n"}, "host_packages=True"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_what_to_do(tmp_path: Path, what: str) -> None:
    files, reason = REFUSED[what]
    folder = folder_of(tmp_path / "task", {"tests/test.sh": PLAIN} | files)
    with pytest.raises(TaskError, match=reason) as caught:
        read_harbor_task(folder)
    assert str(folder) in str(caught.value)
    folder_of(tmp_path / "other", {"tests/test.sh": PLAIN})
    with pytest.raises(TaskError, match=r"1 of 2 tasks in .* cannot run:\n.*\nAll: task"):
        load_harbor_tasks(tmp_path)


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("apt-get update && apt-get install -y curl", ": && :"),
        ("(apt-get update && apt-get install -y curl) || true", "(: && :) || true"),
        ("which curl || apt-get install -y curl", "which curl || :"),
        ("sudo -E apt-get install -y jq", ":"),
        (
            "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq jq >/dev/null 2>&1",
            "DEBIAN_FRONTEND=noninteractive :",
        ),
        (
            "if ! command -v uv >/dev/null; then curl -LsSf https://a.b/i.sh | sh; fi",
            "if ! command -v uv >/dev/null; then :; fi",
        ),
        ('. "$HOME/.local/bin/env"', ":"),
        ("pip install -q pytest || exit 1", ": || exit 1"),
        ("pip3 install x  # curl https://a.b", ":  # curl https://a.b"),
        ("/opt/v/bin/pip install pytest; /opt/v/bin/pytest /tests", ":; pytest /tests"),
        ("pip install pytest-json-ctrf; pytest --ctrf /logs/verifier/ctrf.json -rA /tests", ":; pytest -rA /tests"),
        (
            "python -m venv .v; source .v/bin/activate; pip install pytest; python -m pytest",
            ":; :; :; python3 -m pytest",
        ),
        ("uv init; uv add pytest; uv run pytest /tests -q", ":; :; python3 -m pytest /tests -q"),
        ("uv run --with 'pytest>=8' -- pytest@8 /tests > out.txt", "python3 -m pytest /tests > out.txt"),
        ("uv run -p 3.12 python -m unittest /tests/a.py && echo 1", "python3 -m unittest /tests/a.py && echo 1"),
        ("uv run --with numpy /tests/check.py", "python3 /tests/check.py"),
        ("echo 'apt-get install x'; grep 'pip install' README", None),
        ("pytest --ctrf /logs/verifier/ctrf.json", None),
        ("cat <<EOF\napt-get update\nEOF", None),
        ("X=$(date); run_tests ${X} $((1 + 2)) && echo 1", None),
    ],
)
def test_what_is_left_of_a_line(line: str, left: str | None) -> None:
    assert script(f"{line}\n") == f"{line if left is None else left}\n"


@pytest.mark.parametrize(
    "line",
    [
        "wget -q https://example.org/expected.json -O /tmp/e.json",
        'X="$(curl -s https://example.org/v)"',
        "diff <(curl -s https://example.org/v) /app/v",
        "git clone https://example.org/r.git /tmp/r",
        "npx jest",
        "uvx ruff check /app",
    ],
)
def test_what_the_tests_fetch_to_look_at_cannot_be_left_out(line: str) -> None:
    with pytest.raises(TaskError, match=r"put that into tests/"):
        script(f"{line}\n")


def test_which_programs_and_modules_tests_need() -> None:
    assert find_test_programs("cd /tests && pytest -q\nif python -m pytest a; then :; fi\n# python3 -m pytest\n") == {
        "pytest",
        "python:pytest",
    }
    lines = ["pip install 'PyYAML>=6' numpy==2.1 pandas[all] never-imported\nuvx -w scikit-learn pytest\n"]
    lines += ["apt-get install -y python3-lxml", "/opt/v/bin/pip3.11 install psycopg2-binary python-dotenv -r /a/x.txt"]
    sources = {
        "a.py": "import yaml\nfrom numpy import array\nimport json, solution, lxml.etree\ntry:\n import pandas\n"
        "except ImportError:\n pandas = None\n",
        "b/c.py": "from sklearn.svm import SVC\nimport a\ndef f():\n    import dotenv, psycopg2\n",
        "test.sh": "python3 - <<'E'\nfrom PIL import Image\nE\npython -c 'import requests'\n",
    }
    requirements = {"/a/x.txt": "# two\npillow==1\nrequests\n"}
    names = "PIL dotenv lxml numpy psycopg2 requests sklearn yaml"
    assert find_test_modules(lines, sources, requirements.get) == [f"python3:{name}" for name in names.split()]
    assert find_unexplained_modules(sources, ["use numpy, yaml, PIL, requests, lxml and dotenv", "solution.py"]) == [
        "python3:psycopg2",
        "python3:sklearn",
    ]
    assert find_test_commands(["apt-get install -y jq git curl"], ["if cat a | jq .; then git log; fi # curl\n"]) == [
        "git",
        "jq",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "RUN pip3 install pytest not_there",
        "RUN apt-get update && apt-get install -y python3-not-there",
        "RUN python3 -m venv /opt/v && /opt/v/bin/pip install -r requirements.txt",
        "RUN true",  # the image would have had it, and no text of the task speaks of it
    ],
)
def test_a_module_that_the_image_would_have_and_the_tests_import_is_needed(tmp_path: Path, line: str) -> None:
    files: dict[str, str | None] = {
        "environment/Dockerfile": f"FROM ubuntu:24.04\n{line}\nWORKDIR /work\n",
        "environment/requirements.txt": "not-there>=2\n",
        "environment/data.csv": None,
        "tests/test.sh": "python3 -m unittest /tests/test_it.py && echo 1 >/logs/verifier/reward.txt\n",
        "tests/test_it.py": "import not_there\n",
        "tests/test_outputs.py": None,
    }
    folder = folder_of(tmp_path / "task", files)
    with pytest.raises(TaskError, match="install python3:not_there on this machine"):
        read_tasks(str(folder), host_packages=True)
    (folder / "instruction.md").write_text("Write /work/not_there.py.\n")  # then it is the agent's to write
    if line == "RUN true":
        assert len(read_tasks(str(folder), host_packages=True)) == 1


def test_needs_are_looked_for_in_the_root_that_sandboxes_start_from(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set/task", {"tests/test.sh": PLAIN, "tests/test_outputs.py": None})
    (folder / "task.toml").write_text('[metadata]\nneeds = ["bash", "tool-of-the-root", "python3:in_the_root"]\n')
    tree = tmp_path / "root"
    for name in ("bash", "python3", "tool-of-the-root"):
        (tree / "usr/bin").mkdir(parents=True, exist_ok=True)
        (tree / "usr/bin" / name).write_text("")
        (tree / "usr/bin" / name).chmod(0o755)
    (tree / "usr/lib/python3/dist-packages/in_the_root").mkdir(parents=True)
    root = Root(name="mine", folder=tree, programs=(("usr", "/usr"),))
    assert [task.id for task in read_tasks(str(folder), root=root)] == ["task"]
    (tree / "usr/bin/tool-of-the-root").unlink()
    with pytest.raises(TaskError, match="install tool-of-the-root on the root mine"):
        read_tasks(str(folder), root=root)
    with pytest.raises(TaskError, match="install python3:in_the_root, tool-of-the-root on this machine"):
        read_tasks(str(folder))


def test_folders_that_cannot_be_read_are_skipped_by_choice_and_named_with_their_reasons(tmp_path: Path) -> None:
    for name, dockerfile in {
        "good": "FROM ubuntu:22.04\n",
        "bad": "FROM ubuntu:22.04\nUSER postgres\n",
        "worse": "FROM ubuntu:22.04\nRUN true\nUSER mysql\n",
        "other": "FROM a\nENTRYPOINT x\n",
    }.items():
        folder_of(tmp_path / name, {"environment/Dockerfile": dockerfile, "tests/test.sh": PLAIN})
    with pytest.raises(TaskError, match=r"3 of 4 tasks in .*(.|\n)*All: bad other worse\nTo go on .*--on-refuse skip"):
        read_tasks(str(tmp_path))
    said: list[str] = []
    assert [task.id for task in read_tasks(str(tmp_path), on_refuse="skip", on_skip=said.append)] == ["good"]
    assert len(said) == 4
    assert said[0].startswith("task folder 'bad' is left out: ") and "line 2: USER: no line above makes" in said[0]
    assert said[3].startswith(
        f"3 of 4 task folders of {tmp_path} are left out: "
        "2 x environment/Dockerfile: USER: no line above makes the user ..., and the image ... has none of that name; "
        "1 x environment/Dockerfile: ENTRYPOINT: ... cannot be carried out: "
    )
    source = {"name": str(tmp_path), "on_refuse": "skip"}
    assert config_from_dict({"tasks": {"source": [source]}}).tasks.sources[0].on_refuse == "skip"


def test_a_list_of_folders_is_a_source(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        folder_of(tmp_path / "set" / name, {"tests/test.sh": PLAIN, "tests/test_outputs.py": None})
    listed = tmp_path / "good.txt"
    listed.write_text(f"# two of three\nset/c\n\n{tmp_path}/set/a\n")
    assert [task.id for task in read_tasks(str(listed))] == ["c", "a"]
    listed.write_text("set/d\n")
    with pytest.raises(TaskError, match=r"good\.txt names '.*set/d', which is no folder"):
        read_tasks(str(listed))
    listed.write_text("# none\n")
    with pytest.raises(TaskError, match="names no task folder"):
        read_tasks(str(listed))


def test_a_folder_of_the_older_format_is_seen(tmp_path: Path) -> None:
    old: dict[str, str | None] = {"task.toml": None, "instruction.md": None, "task.yaml": "instruction: Write Hello.\n"}
    folder_of(tmp_path / "old", old)
    with pytest.raises(TaskError, match="older format of Terminal-Bench"):
        load_harbor_tasks(tmp_path)
