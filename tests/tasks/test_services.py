"""Tests that look for a service which only the agent could have started: refused, as it has ended when they run."""

from __future__ import annotations

import pytest

from backtalk.errors import TaskError
from backtalk.sandboxes.base import SandboxFile
from backtalk.tasks.load import read_tasks
from backtalk.tasks.services import refuse_services
from backtalk.tasks.task import Split
from backtalk.tasks.triage import triage_tasks

LOOKS = {
    "a port by bash": ("test.sh", "(echo >/dev/tcp/127.0.0.1/8080) && echo 1 >/logs/verifier/reward.txt\n", 1),
    "curl": ("test.sh", "# curl\nif curl -sf http://localhost:8080/health; then echo 1; fi >r\n", 2),
    "nc": ("test.sh", "set -e\nnc -z localhost 22\n", 2),
    "a process by name": ("test.sh", "pgrep -f server.py >/dev/null || exit 1\n", 1),
    "requests": (
        "test_it.py",
        "import requests\n\ndef test_a():\n    assert requests.get('http://127.0.0.1:5000/').ok\n",
        4,
    ),
    "an address in a constant": ("test_it.py", "from urllib.request import urlopen\nURL = 'http://localhost:80/'\n", 2),
    "a socket": ("test_it.py", "import socket\nHOST = 'localhost'\ns.connect((HOST, 80))\n", 2),
    "a process of psutil": ("test_it.py", "import psutil\nassert any(psutil.process_iter())\n", 2),
}
LOOKS_NOT = {
    "a service that the script starts": ("test.sh", "python3 /app/server.py &\ncurl -s http://localhost:8000/\n"),
    "one that the tests start": (
        "test_it.py",
        "import requests\np = Popen(['x'])\nrequests.get('http://localhost/')\n",
    ),
    "one of a start script": (
        "test_it.py",
        "import requests\nsubprocess.run(['bash', '/app/start.sh'])\nU = 'http://localhost/'\n",
    ),
    "an address in a file": ("test.sh", "grep -q 'listen 127.0.0.1:80' /etc/nginx/nginx.conf\n"),
    "an address in a configuration": ("test_it.py", "import json\nassert json.load(f)['host'] == 'localhost'\n"),
    "a comment": ("test.sh", "# then curl http://localhost:80/\necho 1 >/logs/verifier/reward.txt\n"),
}


def files(path: str, text: str) -> dict[str, SandboxFile]:
    return {path: SandboxFile(text.encode())}


@pytest.mark.parametrize("what", LOOKS)
def test_tests_that_look_for_the_agents_service_are_refused_by_line(what: str) -> None:
    path, text, line = LOOKS[what]
    with pytest.raises(TaskError, match=rf"^tests/{path}, line {line}: .*every process of the agent ends before"):
        refuse_services("tests", files(path, text), {})
    refuse_services("tests", files(path, text), {"tests_start_services": True})


@pytest.mark.parametrize("what", LOOKS_NOT)
def test_other_tests_are_not(what: str) -> None:
    refuse_services("tests", files(*LOOKS_NOT[what]), {})


def test_none_of_our_own_tasks_looks_for_one() -> None:
    for task in [*read_tasks("workbench"), *triage_tasks(split=Split.TRAIN, levels=(1, 2, 3), count=20, seed=0)]:
        refuse_services(task.id, task.tests, task.metadata)
