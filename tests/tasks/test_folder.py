"""Task folders: what is read, what is refused, and that writing loses nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backtalk.errors import ConfigError, TaskError
from backtalk.sandboxes.base import SandboxFile
from backtalk.sandboxes.images.dockerfile import parse_dockerfile
from backtalk.tasks.folder import load_harbor_tasks, read_harbor_task, write_harbor_task
from backtalk.tasks.load import load_tasks
from backtalk.tasks.task import Split, Task

TEST_SH = "echo 1 > /logs/verifier/reward.txt\n"


def make(folder: Path, files: dict[str, str | bytes] | None = None, dockerfile: str = "") -> Path:
    """A task folder of the fewest files, and ``files`` over it."""
    whole: dict[str, str | bytes] = {"task.toml": "", "instruction.md": "Do it.\n", "tests/test.sh": TEST_SH}
    if dockerfile:
        whole["environment/Dockerfile"] = dockerfile
    for name, content in (whole | (files or {})).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_the_smallest_task(tmp_path: Path) -> None:
    task = read_harbor_task(make(tmp_path / "count-lines"))
    assert task == Task(
        id="count-lines",
        instruction="Do it.\n",
        tests={"test.sh": SandboxFile(TEST_SH.encode())},
        verifier_timeout_s=600.0,
    )


@pytest.mark.parametrize("missing", ["task.toml", "instruction.md", "tests/test.sh"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (make(tmp_path) / missing).unlink()
    with pytest.raises(TaskError, match=f"has no {missing}"):
        read_harbor_task(tmp_path)


def test_a_task_for_the_world_model_needs_no_tests(tmp_path: Path) -> None:
    folder = make(tmp_path, {"task.toml": "[metadata]\nworld_model_only = true\n"})
    (folder / "tests/test.sh").unlink()
    task = read_harbor_task(folder)
    assert task.world_model_only and not task.tests
    write_harbor_task(task, tmp_path / "again")
    assert read_harbor_task(tmp_path / "again").world_model_only


OLD = """
version = "1.0"
[metadata]
difficulty = "medium"
[agent]
timeout_sec = 900.0
[verifier]
timeout_sec = 120
[environment]
docker_image = "somebody/task:1"
allow_internet = true
cpus = 2
"""

NEW = """
schema_version = "1.4"
artifacts = []
[task]
name = "org/count-lines"
keywords = ["text"]
[[task.authors]]
name = "A"
[metadata]
difficulty = "medium"
[agent]
timeout_sec = 900.0
user = "root"
[verifier]
timeout_sec = 120
[verifier.env]
[environment]
network_mode = "no-network"
workdir = "/srv"
gpus = 0
mcp_servers = []
env = { WHO = "me" }
"""


def test_the_old_schema(tmp_path: Path) -> None:
    task = read_harbor_task(make(tmp_path / "old", {"task.toml": OLD}, "FROM ubuntu:24.04\nWORKDIR /app\n"))
    assert (task.id, task.agent_timeout_s, task.verifier_timeout_s, task.workdir) == ("old", 900.0, 120.0, "/app")
    assert task.metadata == {
        "difficulty": "medium",
        "base_image": "ubuntu:24.04",
        "world_notes": ["allow_internet = True: runs offline all the same"],
        "harbor": {"environment": {"docker_image": "somebody/task:1", "allow_internet": True, "cpus": 2}},
    }


def test_the_new_schema(tmp_path: Path) -> None:
    task = read_harbor_task(make(tmp_path / "new", {"task.toml": NEW}))
    assert (task.id, task.agent_timeout_s, task.verifier_timeout_s) == ("org/count-lines", 900.0, 120.0)
    assert (task.workdir, task.env) == ("/srv", {"WHO": "me"})
    assert task.metadata == {
        "difficulty": "medium",
        "harbor": {
            "task": {"keywords": ["text"], "authors": [{"name": "A"}]},
            "agent": {"user": "root"},
            "environment": {"gpus": 0},
        },
    }


@pytest.mark.parametrize("schema", [OLD, NEW])
def test_foreign_keys_are_written_back_to_their_places(tmp_path: Path, schema: str) -> None:
    task = read_harbor_task(make(tmp_path / "foreign", {"task.toml": schema}, "FROM ubuntu:24.04\nWORKDIR /srv\n"))
    write_harbor_task(task, tmp_path / "copy")
    assert read_harbor_task(tmp_path / "copy") == task
    assert ("cpus = 2" in (tmp_path / "copy/task.toml").read_text()) == (schema == OLD)


def test_marker_lines_are_no_instruction(tmp_path: Path) -> None:
    text = "<!-- some canary GUID 1234 -->\n# CANARY: do not train\nCount the lines.\n# a canary bird is fine here\n"
    task = read_harbor_task(make(tmp_path, {"instruction.md": text}))
    assert task.instruction == "Count the lines.\n# a canary bird is fine here\n"


def test_a_dockerfile_becomes_files_commands_and_variables(tmp_path: Path) -> None:
    dockerfile = r"""
# a comment
FROM python:3.12-slim AS base
ARG SIZE=3
ENV DATA=/data MODE="two words" \
    RAW='$DATA'
ENV OLD some old style
LABEL who=me
WORKDIR /app
COPY one.txt ./
COPY sub/*.txt "sub/with space.csv" $DATA/
COPY . /all/
COPY --chmod=600 one.txt /etc/secret
WORKDIR inner
# in between
RUN mkdir -p /var/x && \
    # a comment within
    echo "a && b" > /var/x/y
RUN cat > /app/z <<'EOF'
line $1
  # no comment
EOF
RUN <<EOF
set -u
echo script
EOF
RUN ["printf", "%s", "a b"]
CMD ["bash"]
"""
    files: dict[str, str | bytes] = {
        "environment/one.txt": "1",
        "environment/sub/a.txt": b"\x00\xff",
        "environment/sub/b.txt": "b",
        "environment/sub/with space.csv": "c",
    }
    task = read_harbor_task(make(tmp_path, files, dockerfile))
    assert task.env == {"DATA": "/data", "MODE": "two words", "RAW": "$DATA", "OLD": "some old style"}
    assert task.workdir == "/app/inner"
    assert {path: file.content for path, file in task.files.items() if not path.startswith("/all/")} == {
        "/app/one.txt": b"1",
        "/data/a.txt": b"\x00\xff",
        "/data/b.txt": b"b",
        "/data/with space.csv": b"c",
        "/etc/secret": b"1",
    }
    assert set(task.files) >= {"/all/one.txt", "/all/sub/a.txt", "/all/sub/with space.csv", "/all/Dockerfile"}
    assert task.files["/etc/secret"].mode == 0o600
    assert [command.removeprefix("export SIZE=3\n") for command in task.setup] == [
        'mkdir -p /var/x &&     echo "a && b" > /var/x/y',
        "cat > /app/z <<'EOF'\nline $1\n  # no comment\nEOF",
        "set -u\necho script",
        "printf %s 'a b'",
    ]
    assert task.metadata["base_image"] == "python:3.12-slim"


def test_commands_run_where_the_dockerfile_stood(tmp_path: Path) -> None:
    task = read_harbor_task(make(tmp_path, dockerfile="FROM x\nWORKDIR /a\nRUN pwd\nWORKDIR /b\nRUN pwd\n"))
    assert task.setup == ("cd /\nmkdir -p /a", "cd /a\npwd", "pwd")


def test_a_copy_into_a_known_folder_keeps_the_name(tmp_path: Path) -> None:
    lines = "FROM x\nRUN mkdir -p /known\nCOPY f /known\nCOPY f /unknown\nWORKDIR /w\nCOPY f .\nCOPY f /w\n"
    task = read_harbor_task(make(tmp_path, {"environment/f": "1"}, lines))
    assert set(task.files) == {"/known/f", "/unknown", "/w/f"}


def test_octal_modes_and_times_of_copied_files_are_no_commands(tmp_path: Path) -> None:
    lines = "FROM x\nCOPY f 'g h' /\nRUN chmod 640 /f && touch -d @12345 /f '/g h'\nRUN chmod 600 /other\n"
    task = read_harbor_task(make(tmp_path, {"environment/f": "1", "environment/g h": "2"}, lines))
    assert task.files == {"/f": SandboxFile(b"1", 0o640, 12345), "/g h": SandboxFile(b"2", 0o644, 12345)}
    assert task.setup == ("chmod 600 /other",)


def test_heredocs_of_copy(tmp_path: Path) -> None:
    lines = "FROM x\nENV A=1\nCOPY <<EOF /e\n$A\nEOF\nCOPY <<-'EOF' /l/\n\t$A\n\tEOF\n"
    task = read_harbor_task(make(tmp_path, dockerfile=lines))
    assert {path: file.content for path, file in task.files.items()} == {"/e": b"1\n", "/l/EOF": b"$A\n"}


def test_what_looks_like_a_heredoc_and_is_none() -> None:
    lines = "RUN echo $((x << y)) '<<EOF' <<<word\nRUN cat << 'E' > f\nbody\nE\nRUN three\n"
    found = [(i.line, i.shell, len(i.heredocs)) for i in parse_dockerfile(lines)]
    assert found == [
        (1, "echo $((x << y)) '<<EOF' <<<word", 0),
        (2, "cat << 'E' > f\nbody\nE", 1),
        (5, "three", 0),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('ENTRYPOINT ["x"]', "nothing is started"),
        ("FROM y", "several stages"),
        ("COPY --from=base /a /b", "no image to copy from"),
        ("ADD https://example.org/a /a", "needs the network"),
        ("ADD a.tar.gz /a", "fetches or unpacks"),
        ("COPY ../secret /a", "leads out of"),
        ("COPY sub/../../secret /a", "leads out of"),
        ("COPY nothing /a", "there is no 'nothing'"),
        ("COPY outside /a", "leads out of"),
        ("COPY folder /a", "leads out of|link to a folder"),
        ("COPY outer /a", "leads out of|link to a folder"),
        ("RUN apt-get update && apt-get install -y jq", "host_packages=True"),
        ("RUN curl -sSf https://example.org/x | bash", "needs the network"),
        ("RUN --mount=type=secret,id=a cat /run/secrets/a", "no image builder"),
        ("RUN <<EOF\n#!/usr/bin/env python3\nprint(1)\nEOF", "is not bash"),
        ('SHELL ["pwsh"]', "another shell"),
        ("COPY a", "a source and a destination"),
        ("RUNN x", "no such instruction"),
    ],
)
def test_what_a_dockerfile_may_not_ask(tmp_path: Path, line: str, reason: str) -> None:
    folder = make(tmp_path / "task", {"environment/folder/x": "1", "environment/a.tar.gz": "1"}, f"FROM x\n\n{line}\n")
    (tmp_path / "secret").write_text("s")
    (tmp_path / "secrets").mkdir()
    (folder / "environment/outside").symlink_to(tmp_path / "secret")
    (folder / "environment/outer").symlink_to(tmp_path / "secrets")
    (folder / "environment/folder/up").symlink_to(tmp_path / "secret")
    with pytest.raises(TaskError, match=reason) as caught:
        read_harbor_task(folder)
    assert "Dockerfile, line 3" in str(caught.value)


def test_links_within_the_folder_are_followed_and_others_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "task", {"tests/real.py": "x"})
    (folder / "tests/link.py").symlink_to("real.py")
    assert read_harbor_task(folder).tests["link.py"].content == b"x"
    (folder / "tests/out.py").symlink_to("/etc/hostname")
    with pytest.raises(TaskError, match=r"out\.py leads out of"):
        read_harbor_task(folder)


PACKAGES = """\
FROM ubuntu:22.04
RUN apt-get update && \\
    apt-get install -y python3-pip && \\
    ln -s /usr/bin/python3 /usr/bin/python && \\
    rm -rf /var/lib/apt/lists/*
RUN pip3 install pytest==8.4.1
RUN apt-get install -y jq && mkdir -p /logs2; echo "apt-get x" > /f
RUN cat > /readme <<'EOF'
apt-get install thing
curl https://example.org
EOF
"""


def test_packages_of_this_machine_stand_in_when_promised(tmp_path: Path) -> None:
    task = read_harbor_task(make(tmp_path, dockerfile=PACKAGES), host_packages=True)
    assert task.setup == (
        'mkdir -p /logs2 ; echo "apt-get x" > /f',
        "cat > /readme <<'EOF'\napt-get install thing\ncurl https://example.org\nEOF",
    )
    assert task.metadata["world_notes"] == [
        f"left out, this machine's packages are used: {command}"
        for command in (
            "apt-get update",
            "apt-get install -y python3-pip",
            "pip3 install pytest==8.4.1",
            "apt-get install -y jq",
        )
    ]


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ("[[steps]]\nname = 'a'", "several"),
        ("[agent]\nuser = 'bob'", "one ordinary user"),
        ("[agent]\ntimeout_sec = 'soon'", "no number of seconds"),
        ("[verifier]\ntimeout_sec = 0", "no number of seconds"),
        ("[verifier.env]\nKEY = 'x'", "environment.env"),
        ("[verifier]\nenvironment_mode = 'separate'", "agent's sandbox"),
        ("[environment]\ngpus = 1", "no GPU"),
        ("[environment]\nos = 'windows'", "Linux"),
        ("[environment]\ndocker_image = 'a/b:1'", "ready-made image"),
        ("[environment.env]\nKEY = '${KEY}'", "secret"),
        ("[environment.env]\n'K-EY' = 'x'", "name of an environment variable"),
        ("[environment]\nworkdir = 'x'", "no absolute path"),
        ("agent = 3", "has to be a table"),
        ("not toml", "is not TOML"),
    ],
)
def test_what_task_toml_may_not_ask(tmp_path: Path, toml: str, reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        read_harbor_task(make(tmp_path, {"task.toml": toml}))


def test_other_files_that_are_refused(tmp_path: Path) -> None:
    for name in ("environment/docker-compose.yaml", "trajectory.json"):
        with pytest.raises(TaskError, match=Path(name).name):
            read_harbor_task(make(tmp_path / Path(name).stem, {name: "{}"}))
    with pytest.raises(TaskError, match="dockerignore"):
        read_harbor_task(make(tmp_path / "ignore", {"environment/.dockerignore": "x"}, "FROM x\n"))
    with pytest.raises(TaskError, match="is empty"):
        read_harbor_task(make(tmp_path / "empty", {"instruction.md": " \n"}))
    with pytest.raises(TaskError, match="not UTF-8"):
        read_harbor_task(make(tmp_path / "bytes", {"instruction.md": b"\xff"}))


RICH = Task(
    id="rich: a/b c",
    instruction='Say "hi"\r\n\ttwice, ünïcode \U0001f600.',
    files={
        "/home/agent/a b.txt": SandboxFile(b"1", 0o600, 1_700_000_000),
        "/etc/bin/run": SandboxFile(b"\x00\xff\n", 0o755),
        "/srv/it's": SandboxFile(b"", 0o644, 5),
        "/srv/own": SandboxFile(b"", 0o4711),
    },
    setup=("echo one", "cat > x <<'END_OF_SETUP'\n$A\nEND_OF_SETUP\n", "", "  chmod 600 '/etc/bin/run' \\"),
    env={"A": 'q"$B`\\', "LINES": "one\ntwo", "EMPTY": "", "S": "it's  # no comment"},
    workdir="/srv/w",
    tests={"test.sh": SandboxFile(b"exit 1", 0o755, 7), "data/x.bin": SandboxFile(bytes(range(256)), 0o440)},
    solution={"solve.sh": SandboxFile(b"true")},
    agent_timeout_s=12.5,
    verifier_timeout_s=3.0,
    metadata={
        "level": 2,
        "score": 0.1,
        "yes": True,
        "text": 'a"b\\c\n\x7f\u2028',
        "list": [1, [2], {"a": "b"}],
        "deep": {"er": {"a.b": {}}},
        "commands": ["ls | wc"],
    },
)


def test_writing_and_reading_loses_nothing(tmp_path: Path) -> None:
    write_harbor_task(RICH, tmp_path / "rich")
    assert read_harbor_task(tmp_path / "rich") == RICH
    with pytest.raises(TaskError, match="not empty"):
        write_harbor_task(RICH, tmp_path / "rich")


def test_modes_and_times_survive_a_checkout_that_forgets_them(tmp_path: Path) -> None:
    write_harbor_task(RICH, tmp_path / "rich")
    for path in (tmp_path / "rich").rglob("*"):
        if path.is_file():
            path.chmod(0o775 if path.stat().st_mode & 0o100 else 0o664)
    assert read_harbor_task(tmp_path / "rich") == RICH


_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
_name = st.from_regex(r"[A-Za-z0-9_.' $\"\\#-]{1,8}", fullmatch=True).filter(lambda name: name not in (".", ".."))
_file = st.builds(
    SandboxFile,
    st.binary(max_size=8),
    st.integers(0, 0o7777),
    st.none() | st.integers(0, 2_000_000_000),
)
_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.builds(
        Task,
        id=_text.filter(bool),
        instruction=_text.map(lambda text: "Do: " + text),
        files=st.dictionaries(_name.map(lambda name: f"/d/{name}"), _file, max_size=3),
        setup=st.lists(_text, max_size=2).map(tuple),
        env=st.dictionaries(st.from_regex(r"[A-Za-z_]\w{0,5}", fullmatch=True).filter(str.isascii), _text, max_size=2),
        tests=st.dictionaries(_name, _file, max_size=2).map(lambda tree: tree | {"test.sh": SandboxFile(b"x")}),
        metadata=st.dictionaries(st.text("abc", min_size=1, max_size=3), _values, max_size=3),
    )
)
def test_any_task_comes_back_as_it_was(task: Task) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_harbor_task(task, Path(folder) / "task")
        assert read_harbor_task(Path(folder) / "task") == task


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"files": {"/a/../../b": SandboxFile(b"")}}, "plain"),
        ({"files": {"relative": SandboxFile(b"")}}, "absolute"),
        ({"tests": {"test.sh": SandboxFile(b""), "../x": SandboxFile(b"")}}, "plain"),
        ({"workdir": "/a b"}, "plain absolute path"),
        ({"metadata": {"a": None}}, "cannot be written as TOML"),
    ],
)
def test_what_has_no_place_in_the_format(tmp_path: Path, changed: dict[str, object], reason: str) -> None:
    parts: dict[str, object] = {"id": "x", "instruction": "y", "tests": {"test.sh": SandboxFile(b"")}}
    with pytest.raises(TaskError, match=reason):
        write_harbor_task(Task(**(parts | changed)), tmp_path / "task")  # type: ignore[arg-type]


def test_a_triage_task_is_a_folder_too(tmp_path: Path) -> None:
    tasks = load_tasks("triage", split=Split.TRAIN, count=4, levels=(1, 3), seed=1)
    for task in tasks:
        write_harbor_task(task, tmp_path / "tasks" / task.id)
    assert load_harbor_tasks(tmp_path / "tasks") == sorted(tasks, key=lambda task: task.id)


def test_load_tasks_from_a_folder(tmp_path: Path) -> None:
    for i in range(20):
        make(tmp_path / f"task-{i}")
    (tmp_path / "README.md").write_text("not a task")
    (tmp_path / "notes").mkdir()
    every = {task.id: task for task in load_harbor_tasks(tmp_path)}
    assert len(every) == 20
    train = load_tasks(str(tmp_path), split=Split.TRAIN, count=100)
    held_out = load_tasks(str(tmp_path), split=Split.HELD_OUT, count=100)
    assert {t.id for t in train} | {t.id for t in held_out} == set(every)
    assert {t.split for t in train} == {Split.TRAIN} and {t.split for t in held_out} == {Split.HELD_OUT}
    few = load_tasks(str(tmp_path), split=Split.TRAIN, count=3, seed=1)
    assert few == load_tasks(str(tmp_path), split=Split.TRAIN, count=3, seed=1) and len(few) == 3
    one = next(iter(train))
    assert load_tasks(str(tmp_path / one.id), split=Split.TRAIN, count=5) == [one]
    assert load_tasks(str(tmp_path / one.id), split=Split.HELD_OUT, count=5) == []


def test_what_load_tasks_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither 'triage' nor a folder"):
        load_tasks("triag", split=Split.TRAIN, count=1)
    with pytest.raises(TaskError, match="holds no task folder"):
        load_tasks(str(tmp_path), split=Split.TRAIN, count=1)
    for name in ("a", "b"):
        make(tmp_path / name, {"task.toml": "[task]\nname = 'x/same'"})
    with pytest.raises(TaskError, match=r"the task 'x/same' is in .* and again in .*; rename one"):
        load_tasks(str(tmp_path), split=Split.TRAIN, count=1)
    (tmp_path / "a/tests/test.sh").unlink()
    with pytest.raises(TaskError, match=r"1 of 2 tasks.*\n.*has no tests/test.sh.*\nAll: a"):
        load_tasks(str(tmp_path), split=Split.TRAIN, count=1)
