"""Make the test scripts of tasks run without a network, which no sandbox has.

Many published tasks install their test runner when the tests begin. Offline that fails, and most of these scripts
then write a reward of 0, whatever the agent did. So such a script is refused, or, where the user promises that this
machine has what it installs, run without those commands. A script that fetches data for the tests is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from backtalk.errors import TaskError
from backtalk.sandboxes.base import SandboxFile
from backtalk.sandboxes.images.shellwords import split_words, unquoted

_BEFORE = re.compile(
    r"(?:(?:if|then|elif|else|do|while|until|!|\{|time|exec|sudo(?:\s+-\S+)*|env|timeout\s+\S+"
    r"|\w+=(?:[^\s\"'(`]|\"[^\"]*\"|'[^']*')*)\s+)*"
)
_SUDO = re.compile(r"\bsudo(?:\s+-\S+)*\s+$")
_INSTALLS = re.compile(
    r"(?:\S*/)?(?:(?:apt-get|apt|apk|yum|dnf|npm|pip3?|python3?\s+-m\s+pip|uv\s+pip|conda|pipx)\s+(?:-\S+\s+)*"
    r"(?:update|upgrade|install|add|ci)\b|uv\s+(?:add|init|sync|venv)\b|uv\s+tool\s+install\b)"
)
_READS_UV = re.compile(r"(?:source|\.)\s+\S*\.(?:local/bin|cargo)/env\"?$")  # a file that installing uv writes
_VENV = re.compile(r"(?:\S*/)?(?:python3?\s+-m\s+venv|virtualenv)\s|(?:source|\.)\s+\S*/bin/activate\"?$")
_ADDRESS = r"\bhttps?://(?!localhost|127\.|\[::1\])"
_FETCHES = re.compile(rf"(?:^|[|`(]\s*)(?:curl|wget|git\s+clone)\b.*{_ADDRESS}", flags=re.DOTALL)
_INSTALLER = re.compile(
    rf"(?:curl|wget)\b.*{_ADDRESS}.*\|\s*(?:sudo\s+(?:-\S+\s+)*)?(?:\w+=\S*\s+)*(?:ba|da)?sh\b", re.DOTALL
)
_RUNS_FETCHED = re.compile(r"(?:uvx|uv\s+(?:tool\s+)?run|pipx\s+run|npx)\s")
_WITH_VALUE = ("-p", "--python", "-w", "--with", "--from", "--index-url", "--project", "--with-requirements", "--spec")
_PLUGIN_OPTION = re.compile(r"\s--(?:ctrf|json-report-file)(?:=|\s+)\S+|\s--json-report\b(?!-)")
_PYTEST = re.compile(r"(?:\S*/)?(?:pytest|py\.test|python3?\s+(?:-\w+\s+)*-m\s+pytest)\b")
_PACKAGE = re.compile(r"[A-Za-z][\w.-]*(?=$|\[|[<>=!~])")
_MODULES = {
    "beautifulsoup4": "bs4",
    "opencv-python": "cv2",
    "pillow": "PIL",
    "python-dateutil": "dateutil",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)([A-Za-z_]\w*)\1")


def make_script_offline(path: Path, content: bytes, *, host_packages: bool) -> tuple[bytes, list[str]]:
    """Return a bash script without its commands that install or fetch, and notes of what was changed.

    Raises:
        TaskError: it has such commands and ``host_packages`` is False, or one that cannot be replaced, or it is no
            script that bash can run.
    """
    text = content.decode("utf-8", "surrogateescape")
    _check_form(path, text)
    changed, notes = "", []
    lines = list(_logical_lines(text))
    offline = host_packages and any(_installs(line) for _, line, is_code in lines if is_code)
    for number, line, is_code in lines:
        done = 0
        for begin, end in _spans(line) if is_code else []:
            command = line[begin:end]
            replacement = _replacement(command, alone=not offline)
            if replacement is None:
                continue
            place = f"{path}, line {number}: {command!r}"
            if not host_packages:
                raise TaskError(
                    f"{place} needs the network, and a sandbox has none: the tests would fail whatever the agent did. "
                    "Install what they need on this machine, then read the task with host_packages=True "
                    "(host_packages: true of a source in a run's settings), and it is left out"
                )
            if replacement == "":
                raise TaskError(f"{place} fetches what it runs or looks at; put that into tests/ and call it there")
            sudo = _SUDO.search(line[:begin])
            changed += line[done : sudo.start() if sudo else begin] + replacement
            done = end
            what = "left out" if replacement == ":" else f"run as {replacement!r}"
            notes.append(f"tests/{path.name}, line {number}: {what}, this machine's packages are used: {command}")
        changed += line[done:]
    return (changed.encode("utf-8", "surrogateescape") if notes else content), notes


def make_tests_offline(
    folder: Path, tests: Mapping[str, SandboxFile], host_packages: bool
) -> tuple[dict[str, SandboxFile], list[str]]:
    """Return the tests of a folder, their scripts without what needs the network, and notes of what was left out."""
    kept, notes = dict(tests), []
    for path, file in tests.items():
        if path.endswith(".sh"):
            content, changes = make_script_offline(folder / path, file.content, host_packages=host_packages)
            kept[path] = replace(file, content=content)
            notes += changes
    return kept, notes


def find_test_programs(text: str) -> set[str]:
    """Return the test runners that a script calls, as ``needs`` names them: "pytest", "python3:pytest"."""
    commands = [line[b:e] for _, line, is_code in _logical_lines(text) if is_code for b, e in _spans(line)]
    found = [re.split(r"\s", match.group()) for command in commands if (match := _PYTEST.match(command))]
    return {"pytest" if len(words) == 1 else f"{words[0]}:pytest" for words in found if "/" not in words[0]}


def find_test_modules(scripts: Iterable[str], sources: Iterable[str]) -> list[str]:
    """Return the modules that scripts install and the tests' sources import, as ``needs`` names them, sorted."""
    words = {
        w for s in scripts for _, line, _ in _logical_lines(s) if _installs(line) for w in re.split(r"[\s,'\"]+", line)
    }
    packages = {match.group().lower() for word in words if (match := _PACKAGE.match(word))}
    named = {_MODULES.get(package, package.replace("-", "_")) for package in packages}
    imported = re.compile(r"^(?:import|from)[ \t]+([A-Za-z_]\w*)", flags=re.MULTILINE)
    return sorted(
        f"python3:{name}" for name in named & {name for source in sources for name in imported.findall(source)}
    )


def _check_form(path: Path, text: str) -> None:
    first = text.partition("\n")[0]
    if first.endswith("\r"):
        raise TaskError(f"{path} has line ends of Windows, which bash takes for a part of its commands; write LF")
    if path.name == "test.sh" and first.startswith("#!") and not re.search(r"\b(?:ba|da)?sh\b", first):
        raise TaskError(f"{path} begins with {first!r}, and test.sh is run by bash; let a test.sh of bash call it")


def _installs(line: str) -> bool:
    commands = [line[begin:end] for begin, end in _spans(line)]
    return any(_INSTALLS.match(command) or _RUNS_FETCHED.match(command) for command in commands)


def _replacement(command: str, *, alone: bool) -> str | None:
    """Return what to run instead of a command: None is the command itself, ``:`` nothing, "" that nothing can.

    ``alone`` is a command of a script that installs nothing, or whose installing is not left out.
    """
    if _INSTALLS.match(command) or _INSTALLER.match(command) or _READS_UV.match(command):
        return ":"
    if not alone and _VENV.match(command):
        return ":"
    if not alone and _PYTEST.match(command):
        bare = re.sub(r"^\S*/", "", _PLUGIN_OPTION.sub("", command))
        bare = re.sub(r"^python(?=\s)", "python3", bare)
        return bare if bare != command else None
    if _FETCHES.search(command):
        return ""
    if not _RUNS_FETCHED.match(command):
        return None
    words = iter(split_words(command.replace("\\\n", " "))[1:])
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif word.partition("@")[0] in ("pytest", "py.test"):
            return _PLUGIN_OPTION.sub("", " ".join(["python3 -m pytest", *words]))
        elif re.fullmatch(r"python(?:3[\d.]*)?", word):
            return _PLUGIN_OPTION.sub("", " ".join(["python3", *words]))
        elif word.endswith(".py"):
            return " ".join(["python3", word, *words])
        elif not word.startswith("-") and word not in ("run", "tool"):
            return ""
    return ""


def _spans(line: str) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each command of a line, without words before it such as ``if`` and ``sudo``.

    Commands end at ``;``, ``&&``, ``||`` and brackets; a pipeline is one command. ``$(...)`` within double quotes
    belongs to the command around it.
    """
    edges, last = [], -1
    for at in unquoted(line):
        if line[at] == "#" and (at == 0 or line[at - 1].isspace()):
            edges.append((at, len(line)))
            break
        if at <= last:
            continue
        if line[at] in ";()":
            edges.append((at, at + 1))
        elif line.startswith(("&&", "||"), at):
            edges.append((at, at + 2))
            last = at + 1
    begins = [0, *(end for _, end in edges)]
    for begin, end in zip(begins, [*(at for at, _ in edges), len(line)], strict=True):
        end = begin + len(line[begin:end].rstrip())
        begin = end - len(line[begin:end].lstrip())
        begin += len(_BEFORE.match(line[begin:end]).group())  # type: ignore[union-attr]  # it matches anything
        if begin < end:
            yield begin, end


def _logical_lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (number, line with its continuation lines, whether it is code, not a comment or a heredoc's body)."""
    physical = text.splitlines(keepends=True)
    at = 0
    while at < len(physical):
        start, line = at, physical[at]
        at += 1
        is_code = not line.lstrip().startswith("#")
        while is_code and line.rstrip("\n").endswith("\\") and at < len(physical):
            line += physical[at]
            at += 1
        yield start + 1, line, is_code
        open_places = set(unquoted(line)) if is_code else set()
        for mark in _HEREDOC.finditer(line):
            while mark.start() in open_places and line[mark.start() - 1 : mark.start()] != "<" and at < len(physical):
                at += 1
                yield at, physical[at - 1], False
                if physical[at - 1].strip() == mark.group(2):
                    break
