"""Find the Python modules that tests import and that something has to install, so that they are among the needs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

from backtalk.tasks.shell import command_spans, logical_lines

INSTALLS = re.compile(
    r"(?:\S*/)?(?:(?:apt-get|apt|apk|yum|dnf|npm|pip[\d.]*|python[\d.]*\s+-m\s+pip|uv\s+pip|conda|mamba|pipx)"
    r"\s+(?:-\S+\s+)*(?:update|upgrade|install|add|ci)\b|uv\s+(?:add|init|sync|venv)\b|uv\s+tool\s+install\b)"
)
RUNS_FETCHED = re.compile(r"(?:uvx|uv\s+(?:tool\s+)?run|pipx\s+run|npx)\s")
_PACKAGE = re.compile(r"[A-Za-z][\w.-]*(?=$|\[|[<>=!~;])")
_REQUIREMENTS = re.compile(r"(?:-r\s*|--requirement[=\s]\s*)(\S+)")
_AROUND_NAMES = re.compile(r"^(?:python3?_|py(?!test))|(?:_python3?|_binary|_headless|_stubs|py3?)$")
# Distributions whose module has another name.
_MODULES = {
    "beautifulsoup4": "bs4",
    "gitpython": "git",
    "google_api_python_client": "googleapiclient",
    "msgpack_python": "msgpack",
    "mysqlclient": "mysqldb",
    "opencv_contrib_python": "cv2",
    "opencv_python": "cv2",
    "opencv_python_headless": "cv2",
    "pil": "pil",
    "pillow": "pil",
    "protobuf": "google",
    "pycryptodome": "crypto",
    "pymupdf": "fitz",
    "scikit_image": "skimage",
    "scikit_learn": "sklearn",
    "setuptools": "pkg_resources",
}


def find_test_modules(
    installs: Iterable[str], sources: Mapping[str, str], read: Callable[[str], str | None] = lambda path: None
) -> list[str]:
    """Return the modules that ``installs`` install and the tests import, as ``needs`` names them, sorted.

    ``installs`` are commands or scripts, ``sources`` the texts of the tests by path; ``read`` returns the text of a
    file of requirements by its name, if there is one.
    """
    names = {name for text in installs for package in _packages(text, read) for name in _modules_of(package)}
    imported = {module for module in _imported(sources) if module.lower() in names}
    return [f"python3:{module}" for module in sorted(imported)]


def find_unexplained_modules(sources: Mapping[str, str], texts: Iterable[str]) -> list[str]:
    """Return the modules that tests import and that no text of the task speaks of, as ``needs`` names them, sorted.

    A module that the agent is to write is spoken of in the instruction, in the solution or in the files.
    """
    spoken = {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)}
    return [f"python3:{module}" for module in sorted(_imported(sources) - spoken)]


def find_test_commands(installs: Iterable[str], scripts: Iterable[str]) -> list[str]:
    """Return the packages that ``installs`` install and that scripts of the tests call as commands, sorted."""
    packages = {package for text in installs for package in _packages(text, lambda path: None)}
    called = set()
    for script in scripts:
        for _, line, is_code in logical_lines(script):
            for begin, end in command_spans(line) if is_code else []:
                called |= {piece.split()[0] for piece in line[begin:end].split("|") if piece.split()}
    return sorted(packages & called)


def installs_something(line: str) -> bool:
    """Return whether a line has a command that installs packages, or that fetches what it runs."""
    return any(
        INSTALLS.match(line[begin:end]) or RUNS_FETCHED.match(line[begin:end]) for begin, end in command_spans(line)
    )


def _packages(text: str, read: Callable[[str], str | None]) -> Iterator[str]:
    """Yield the names of packages that the installing commands of a text name, in lower case."""
    for _, line, _ in logical_lines(text):
        if not installs_something(line):
            continue
        words = re.split(r"[\s,'\"]+", line)
        for path in _REQUIREMENTS.findall(line):
            words += [entry.split()[0] for entry in (read(path.strip("'\"")) or "").splitlines() if entry.split()]
        yield from (match.group().lower() for word in words if (match := _PACKAGE.match(word)))


def _modules_of(package: str) -> set[str]:
    """Return the names, in lower case, that the module of a package may have."""
    plain = package.replace("-", "_").replace(".", "_")
    without = _AROUND_NAMES.sub("", plain.removeprefix("python3_"))
    names = {plain, plain.removeprefix("python3_"), without, without.partition("_")[0]}
    return names | {_MODULES[name] for name in names if name in _MODULES}


def _imported(sources: Mapping[str, str]) -> set[str]:
    """Return the modules that have to be there for the tests: not Python's own, nor the tests' own."""
    own = {part.removesuffix(".py") for path in sources for part in path.split("/")}
    found: set[str] = set()
    for path, text in sources.items():
        found |= set(_imports(text) if path.endswith(".py") else _imports_in_script(text))
    return found - own - sys.stdlib_module_names - {"__future__"}


def _imports_in_script(text: str) -> Iterator[str]:
    """Yield the modules imported by Python within a shell script: in a heredoc, or after ``python3 -c``."""
    if "python" in text:
        yield from re.findall(r"^[ \t]*import[ \t]+([A-Za-z_]\w*)[\w.]*[ \t]*(?:$|,|as\b|;)", text, flags=re.MULTILINE)
        yield from re.findall(r"^[ \t]*from[ \t]+([A-Za-z_]\w*)[\w.]*[ \t]+import\b", text, flags=re.MULTILINE)
        yield from re.findall(r"-c[ \t]*[\"'](?:import|from)[ \t]+([A-Za-z_]\w*)", text)


def _imports(text: str) -> Iterator[str]:
    """Yield the top-level names of modules that a source imports, without those whose absence it catches."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # ValueError: a NUL byte
        yield from re.findall(r"^(?:import|from)[ \t]+([A-Za-z_]\w*)", text, flags=re.MULTILINE)
        return
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        children = ast.iter_child_nodes(node)
        todo += [c for c in children if c not in node.body] if isinstance(node, ast.Try) and node.handlers else children
