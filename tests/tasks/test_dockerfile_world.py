"""Worlds that start from a Dockerfile over this machine's programs: as Docker would have them, or refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from backtalk.envs.terminal import TerminalConfig, open_terminal_env
from backtalk.errors import TaskError
from backtalk.messages import ToolCall
from backtalk.sandboxes.images.commands import program_written_to
from backtalk.sandboxes.images.shellwords import split_list
from backtalk.sandboxes.images.start_state import read_dockerfile
from backtalk.tasks.folder import read_harbor_task, write_harbor_task
from sandbox_help import backend_or_skip

# (Dockerfile, command, what it prints): the numbers and words are what `docker build` and `docker run` give.
KINDS = {
    "line ends of Windows": (
        "FROM x\r\nENV A=1\r\nWORKDIR /app\r\nRUN echo one >f && \\\r\n  # a comment\r\n\r\n  echo $A >>f\r\n"
        "RUN cat <<EOF >g\r\nthree\r\nEOF\r\n",
        "cat f g; echo",
        "one\n1\nthree\r\n\n",
    ),
    "lower case": ("from x\nenv A=1\nworkdir /app\nrun echo $A >f\n", "cat f", "1\n"),
    "comments within a command": ("FROM x\nRUN echo a >/f && \\\n# no\n   # no\n\n  echo b >>/f\n", "cat /f", "a\nb\n"),
    "values with spaces": (
        'FROM x\nENV A="two words" B=it\\ is C=\'$A\'\nENV D  three  words\nRUN echo "$A|$B|$C|$D" >/f\n',
        'cat /f; echo "$A|$B|$C|$D"',
        "two words|it is|$A|three  words\n" * 2,
    ),
    "a variable that changes": (
        "FROM x\nENV A=1\nRUN echo $A $B >/f\nENV A=2 B=3\nRUN echo $A $B >>/f\n",
        "cat /f; echo $A $B",
        "1\n2 3\n2 3\n",
    ),
    "a path that changes": (
        "FROM x\nRUN echo $PATH >/f\nENV PATH=/opt/own:$PATH\n",
        "grep -c own /f; echo $PATH | grep -c own",
        "0\n1\n",
    ),
    "arguments before FROM": (
        "ARG A=1\nARG B=2\nFROM x\nARG A\nARG C\nRUN echo $A-$B-$C >/f\n",
        "cat /f",
        "1--\n",
    ),
    "a folder in the middle": (
        "FROM x\nWORKDIR /tmp/build\nRUN echo x >a.txt\nWORKDIR /only/made\nWORKDIR /home/user\n",
        "pwd; ls /tmp/build /only",
        "/home/user\n/only:\nmade\n\n/tmp/build:\na.txt\n",
    ),
    "owners": (
        "FROM x\nRUN useradd -m -d /home/user user || true\n"
        "RUN mkdir -p /home/user/a && chown -R user:user /home/user && if true; then chown root /home/user; fi\n"
        "RUN <<EOF\nset -e\nchgrp nobody /home/user\necho ok >/home/user/f\nEOF\nWORKDIR /home/user\n",
        "ls; echo >a/mine && cat f",
        "a\nf\nok\n",
    ),
    "the user that it ends with": (
        "FROM ubuntu:22.04\nRUN useradd -m -d /home/user -s /bin/bash user\n"
        "RUN echo hi >/home/user/a && chown -R user:user /home/user\nWORKDIR /home/user\nUSER user\n",
        "whoami; id -un user; echo $HOME $USER; stat -c %U:%G a; chown user:user a && cd ~ && pwd",
        "user\nuser\n/home/user user\nuser:user\n/home/user\n",
    ),
    "users and groups of every spelling": (
        "FROM ubuntu:24.04\nARG WHO=dev\nRUN groupadd -g 1001 team && useradd -rm -d /srv/dev -g team -u 1001 $WHO\n"
        "RUN if ! id bob; then adduser --disabled-password --gecos '' bob; fi; /usr/sbin/usermod -aG team bob\n"
        'RUN ["chown", "bob:team", "/srv"]\nRUN echo "bob:secret" | chpasswd && groupdel nogroup\nUSER bob:team\n',
        "whoami; getent group team | cut -d: -f3; ls -d /srv/dev ~; getent passwd dev | cut -d: -f1,3,6",
        "bob\n1000\n/home/bob\n/srv/dev\ndev:1000:/srv/dev\n",
    ),
    "users that the image has": (
        "FROM node:20\nUSER node\nWORKDIR /home/node\n",
        "whoami; pwd; touch x && ls",
        "node\n/home/node\nx\n",
    ),
    "a user by its number": (
        "FROM ubuntu:22.04\nRUN useradd -m -u 1001 dev\nUSER 1001:1001\nWORKDIR /home/dev\n",
        "whoami; cd ~ && pwd; echo $USER",
        "dev\n/home/dev\ndev\n",
    ),
    "commands as another user": (
        "FROM ubuntu:22.04\nRUN useradd -m dev && apt() { :; } && su - dev -c 'pwd >a; echo $USER >>a'\n"
        "WORKDIR /srv\nRUN su dev -c 'pwd >~/b; cd && pwd >>~/b'; runuser -u dev -- sh -c 'pwd >~/c'\n"
        "RUN if true; then sudo -u dev -H touch /home/dev/d && sudo mkdir -p e; fi; gosu dev ls -d e >>/home/dev/a\n"
        "RUN su -c false dev || sudo -E chown dev e && runuser -l dev -c 'ls ~' >/srv/f\n",
        "cat /home/dev/[abc] f",
        "/home/dev\ndev\ne\n/srv\n/home/dev\n/srv\na\nb\nc\nd\n",
    ),
    "volumes, and what only keeps a container alive": (
        'FROM x\nVOLUME ["/data", "/more data"]\nVOLUME /v\nHEALTHCHECK none\nENTRYPOINT ["tini", "--", "/bin/bash"]\n',
        "touch /data/a && ls -d /data '/more data' /v",
        "/data\n/more data\n/v\n",
    ),
    "alternatives": (
        "FROM ubuntu:22.04\nRUN update-alternatives --install /usr/bin/python3 python3 /usr/bin/python3.11 1\n",
        "echo fine",
        "fine\n",
    ),
    "a link called python": (
        "FROM x\nRUN ln -s /usr/bin/python3 /usr/bin/python && python -c 'print(1)' >/f\n",
        "cat /f; python -c 'print(2)'",
        "1\n2\n",
    ),
    "folders that images have": (
        "FROM x\nRUN echo '* * * * * root true' >/etc/cron.d/job\nRUN echo x >/etc/profile.d/x.sh\n",
        "ls /etc/cron.d /etc/profile.d; ls -d /etc/cron.daily /var/spool/cron/crontabs /var/www",
        "/etc/cron.d:\njob\n\n/etc/profile.d:\nx.sh\n/etc/cron.daily\n/var/spool/cron/crontabs\n/var/www\n",
    ),
    "a folder below /usr": (
        "FROM x\nWORKDIR /usr/src/app\nCOPY a.txt .\nCOPY --chown=me:me sub ./sub\nRUN echo made >made\n",
        "pwd; cat a.txt sub/b made; echo more >more && cat more",
        "/usr/src/app\nfrom a\nfrom b\nmade\nmore\n",
    ),
    "a pipeline that fails": (
        'FROM x\nSHELL ["/bin/bash", "-o", "pipefail", "-c"]\nRUN if false | true; then echo passed; fi >/f\n'
        'SHELL ["/bin/bash", "-c"]\nRUN if false | true; then echo passed; fi >>/f; echo end >>/f\n',
        "cat /f",
        "passed\nend\n",
    ),
    "copies into folders that commands made": (
        "FROM x\nRUN mkdir -p /data && touch /data/b\nCOPY a.txt /data\nCOPY a.txt /new\nCOPY sub /data/\n"
        "COPY --chmod=600 a.txt sub/b /more/\n",
        "cd /data; ls; cat a.txt b; cat /new; stat -c %a /more/b; ls -A / | grep -c copy || true",
        "a.txt\nb\nfrom a\nfrom b\nfrom a\n600\n0\n",
    ),
    "copies into folders of every image": (
        "FROM x\nCOPY a.txt /srv\nCOPY sub /opt\n",
        "ls /srv /opt",
        "/opt:\nb\n\n/srv:\na.txt\n",
    ),
}


def folder_of(place: Path, dockerfile: str) -> Path:
    for name, text in {
        "task.toml": "",
        "instruction.md": "Do it.\n",
        "tests/test.sh": "echo 1 >/logs/verifier/reward.txt\n",
        "environment/Dockerfile": dockerfile,
        "environment/a.txt": "from a\n",
        "environment/sub/b": "from b\n",
    }.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(text.encode())
    return place


@pytest.mark.parametrize("kind", KINDS)
async def test_a_world_starts_as_docker_would_start_it(tmp_path: Path, kind: str) -> None:
    dockerfile, command, printed = KINDS[kind]
    task = read_harbor_task(folder_of(tmp_path, dockerfile))
    async with open_terminal_env(task, backend_or_skip(), TerminalConfig(output="raw")) as env:
        await env.reset()
        step = await env.step(ToolCall("bash", {"command": command}))
        assert step.messages[0].text == printed
        assert await env.score() == 1.0


@pytest.mark.parametrize(
    ("dockerfile", "reason"),
    [
        ("FROM ubuntu:22.04\nRUN true\nUSER user\n", r"line 3: USER: no line above makes the user 'user'.*useradd -m"),
        (
            "FROM python:3.12\nUSER ubuntu\n",
            r"line 2: USER: no line above makes the user 'ubuntu', and the image 'p",
        ),
        ("FROM x\nCOPY a.txt /usr/local/bin/tool\n", r"line 2: COPY: /usr/local/bin/tool is among this machine's own"),
        ("FROM x\nRUN true\nADD a.txt /bin/\n", r"line 3: ADD: /bin/ is among"),
        ("FROM x\nWORKDIR /usr/local/app\n", r"line 2: WORKDIR: /usr/local/app is among"),
        ("FROM x\nRUN echo '#!/bin/sh' >/usr/local/bin/t\n", r"line 2: RUN: .* /usr/local/bin/t is among"),
        ("FROM x\nRUN cat <<E | tee -a /usr/bin/t\nx\nE\n", r"line 2: RUN: .* /usr/bin/t is among"),
        ("FROM x\nRUN true && cp -r /opt/a /opt/b /usr/share/\n", r"line 2: RUN: .* /usr/share/ is among"),
        ("FROM x\nRUN mkdir -p /opt/a /usr/lib/a\n", r"line 2: RUN: .* /usr/lib/a is among"),
        ("FROM x\nRUN ln -sf /opt/a /usr/bin/a\n", r"line 2: RUN: .* /usr/bin/a is among"),
        ("FROM x\nRUN if true; then sed -i s/a/b/ /usr/lib/x; fi\n", r"line 2: RUN: .* /usr/lib/x is among"),
        ("FROM x\nRUN /opt/v/bin/pip install jq\n", r"line 2: RUN: '/opt/v/bin/pip install jq' needs the network"),
        ("FROM x\nSHELL bash\n", r"line 2: SHELL: "),
        ("FROM x\nENV A-B=1\n", r"line 2: ENV: 'A-B' is no name that bash can set"),
        ("RUN true\n", r"line 1: RUN: the first instruction must be FROM"),
        ("# nothing\n", r"has no FROM"),
        ("FROM x\nENTRYPOINT /start.sh\n", r"line 2: ENTRYPOINT: '/start.sh' cannot be carried out"),
        ('FROM x\nENTRYPOINT ["bash", "-c", "serve &"]\n', r"line 2: ENTRYPOINT: .* cannot be carried out"),
        ("FROM x\nHEALTHCHECK CMD true\n", r"line 2: HEALTHCHECK: 'CMD true' cannot be carried out"),
    ],
)
def test_what_a_world_cannot_have_is_refused_by_line(tmp_path: Path, dockerfile: str, reason: str) -> None:
    with pytest.raises(TaskError, match=rf"{tmp_path}/environment/Dockerfile.*{reason}"):
        read_dockerfile(folder_of(tmp_path, dockerfile) / "environment", host_packages=False)


@pytest.mark.parametrize(
    "command",
    [
        "cp /usr/share/dict/words /opt/",
        "ln -sf /usr/share/zoneinfo/UTC /etc/localtime",
        "tar -cf /opt/a.tar /usr/share/a",
        "sed -n 1p /usr/share/a >/opt/b 2>/dev/null",
        "rm -f /usr/bin/x || true",
        "echo '/usr/bin/x > y'",
        "if [ ! -e /usr/bin/python ]; then ln -s /usr/bin/python3 /usr/bin/python; fi",
    ],
)
def test_what_only_reads_programs_is_no_write_among_them(command: str) -> None:
    assert [path for _, part in split_list(command) if (path := program_written_to(part))] == []


def test_a_number_of_no_user_has_no_home(tmp_path: Path) -> None:
    lines = "FROM x\nRUN useradd -m -u 1001 dev\nUSER {}\nUSER {}\n"
    for users, home in ((("7", "dev"), "/home/dev"), (("dev", "1001"), "/home/dev"), (("dev", "7"), None)):
        folder = folder_of(tmp_path, lines.format(*users)) / "environment"
        assert read_dockerfile(folder, host_packages=False).env.get("HOME") == home


def test_what_one_user_cannot_have_is_noted(tmp_path: Path) -> None:
    folder_of(tmp_path, "FROM x\nCOPY --chown=a:b a.txt /opt/\nRUN useradd a; chown a /opt; su a -c true\n")
    task = read_harbor_task(tmp_path)
    assert task.metadata["world_notes"] == [
        "a sandbox's one user owns every file: --chown does nothing",
        "users share the one uid of a sandbox: useradd only names it",
        "a sandbox's one user owns every file: chown does nothing",
        "users share the one uid of a sandbox: su just runs the command",
    ]
    assert task.files["/etc/passwd"].content.startswith(b"root:x:0:0:root:/root:/bin/bash\na:x:1000:1000:a:/home/a:")
    write_harbor_task(task, tmp_path / "written")
    assert read_harbor_task(tmp_path / "written") == task


async def test_an_environment_of_its_own_sees_the_packages_of_this_machine(tmp_path: Path) -> None:
    folder_of(tmp_path, "FROM x\nRUN python3 -m venv /opt/v && /opt/v/bin/pip install jq\nENV PATH=/opt/v/bin:$PATH\n")
    task = read_harbor_task(tmp_path, host_packages=True)
    async with open_terminal_env(task, backend_or_skip(), TerminalConfig(output="raw")) as env:
        await env.reset()
        step = await env.step(ToolCall("bash", {"command": "which python; grep include-system-site /opt/v/pyvenv.cfg"}))
    assert step.messages[0].text == "/opt/v/bin/python\ninclude-system-site-packages = true\n"


def test_what_the_image_installs_and_the_tests_import_is_needed(tmp_path: Path) -> None:
    folder_of(tmp_path, "FROM x\nRUN pip3 install pytest pandas numpy\n")
    (tmp_path / "tests/test_it.py").write_text("import pandas\nimport os\n")
    assert read_harbor_task(tmp_path, host_packages=True).metadata["needs"] == ["python3:pandas"]


def test_a_folder_of_the_settings_takes_nothing_from_the_dockerfile(tmp_path: Path) -> None:
    folder_of(tmp_path, "FROM x\nWORKDIR /app\nRUN echo x >f\n")
    (tmp_path / "task.toml").write_text("[environment]\nworkdir = '/srv/w'\n")
    task = read_harbor_task(tmp_path)
    assert task.workdir == "/srv/w" and task.setup == ("cd /\nmkdir -p /app", "cd /app\necho x >f")
