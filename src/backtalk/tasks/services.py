"""Find tests that look for a service which only the agent could have started: it has ended when they run."""

from __future__ import annotations

import re
from collections.abc import Mapping

from backtalk.errors import TaskError
from backtalk.sandboxes.base import SandboxFile

_HERE = r"(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[?::1\]?)"
_CLIENTS = r"(?:curl|wget|nc|ncat|telnet|redis-cli|psql|pg_isready|mysql|mysqladmin)"
_LOOKS = re.compile(
    rf"/dev/tcp/{_HERE}|(?:^|[\s;&|(!]){_CLIENTS}\s[^\n]*{_HERE}|(?:^|[\s;&|(!])(?:pgrep|pidof)\s|process_iter\(|pid_exists\("
    rf"|(?:create_connection|\.connect|\.connect_ex)\(\s*\(\s*[\"']{_HERE}"
    rf"|(?:urlopen|\.get|\.post|\.put|\.request|Connection|Redis|connect)\([^\n]*[\"'/@]{_HERE}"
)
_ADDRESS = re.compile(rf"https?://{_HERE}[:/\"']|[\"']{_HERE}[\"']")
_IMPORTS_CLIENT = re.compile(
    r"^\s*(?:import|from)\s+(?:aiohttp|grpc|http\.client|httpx|paramiko|psycopg2?|pymysql|redis|requests|socket"
    r"|urllib|websockets?)\b",
    re.MULTILINE,
)
_STARTS = re.compile(
    r"(?<!&)&\s*$|\b(?:nohup|setsid)\s|\bPopen\(|multiprocessing|threading|socketserver|HTTPServer|create_subprocess"
    r"|\b(?:systemctl|service|supervisorctl)\b[^\n]*\bstart\b"
    r"|(?:subprocess|os\.system|check_call|check_output|\bbash|\bsh|\bpython3?|\bnode)\b[^\n]*(?:start|serve|daemon|run\b|launch)"
    r"|\.listen\(|testclient|test_client",
    re.MULTILINE | re.IGNORECASE,
)
STARTED = "tests_start_services"


def refuse_services(name: str, tests: Mapping[str, SandboxFile], metadata: Mapping[str, object]) -> None:
    """Refuse tests that look for a running service and start none. ``name`` is the folder of the tests, in messages.

    Raises:
        TaskError: such a line, unless ``metadata`` says that the tests start what they look for.
    """
    texts = {path: file.content.decode("utf-8", "replace") for path, file in tests.items()}
    texts = {  # comment lines are emptied, so that line numbers stay
        path: re.sub(r"^[ \t]*#[^\n]*", "", text, flags=re.MULTILINE)
        for path, text in texts.items()
        if path.endswith((".sh", ".py"))
    }
    if metadata.get(STARTED) is True or any(_STARTS.search(text) for text in texts.values()):
        return
    for path, text in texts.items():
        by_constant = path.endswith(".py") and _IMPORTS_CLIENT.search(text)
        found = _LOOKS.search(text) or (_ADDRESS.search(text) if by_constant else None)
        if found:
            number = text.count("\n", 0, found.start() + len(found.group()) - len(found.group().lstrip())) + 1
            line = text.split("\n")[number - 1].strip()
            raise TaskError(
                f"{name}/{path}, line {number}: {line[:200]!r} looks for a running service, and every process of the "
                "agent ends before the tests: the reward would be 0 whatever it did. Ask for a script that starts the "
                f"service, and start it in tests/test.sh (docs/tasks.md shows how), or write {STARTED} = true under "
                "[metadata] where the tests start it already"
            )
