"""Hooks of mkdocs: pages made from the code, links out of docs/, a Markdown twin of each page, and llms.txt.

A link out of docs/ leads to the same file in the site: other Markdown becomes a page, code is shown as it is. So pages
read the same on a code host, in an editor and here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from backtalk import __version__

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
STAMP = f"Of version {__version__}, made from the code.\n\n"
PYTHON = {  # what a program may import, by what for
    "Trajectories": ("backtalk.trajectory", "backtalk.messages", "backtalk.run.log"),
    "The objective": (
        *("backtalk.objective.config", "backtalk.objective.samples", "backtalk.objective.batch"),
        "backtalk.objective.loss",
    ),
    "Rendering": ("backtalk.language.renderer", "backtalk.language.tokenizer"),
    "Environments and sandboxes": ("backtalk.envs.base", "backtalk.sandboxes.base", "backtalk.tasks.task"),
    "Rollouts": ("backtalk.rollout.limits", "backtalk.rollout.sampler", "backtalk.rollout.rollout"),
    "Engines": ("backtalk.engines.base", "backtalk.engines.conformance.base"),
    "TRL": ("backtalk.hosts.trl.trainer",),
    "Training and scoring": ("backtalk.run.train", "backtalk.run.score"),
    "Errors": ("backtalk.errors",),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/: the changelog, recipes, references, and the files that pages link to."""
    generated = {
        "changelog.md": ("CHANGELOG.md", None),
        "recipes.md": (None, recipes()),
        "reference/settings.md": (None, settings()),
        "reference/commands.md": (None, commands()),
        "reference/python.md": (None, python()),
    }
    for uri, (path, content) in generated.items():
        source = {"content": content} if path is None else {"abs_src_path": str(ROOT / path)}
        files.append(File.generated(config, uri, **source))
    for path in sorted((ROOT / "recipes").glob("*/README.md")):
        files.append(File.generated(config, uri_of(path), abs_src_path=str(path)))
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while waiting:
        page = waiting.pop()
        for target, uri in outside_links(page):
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
                waiting += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links out of docs/ into links inside the site."""
    if not page.file.abs_src_path:
        return markdown
    here = Path(page.file.abs_src_path)
    parts = FENCE.split(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda match: inside(match, here, page.file.src_uri), part)
        for part in parts
    )


def on_post_build(config: Any) -> None:
    """Write a Markdown twin of each page, and llms.txt, which lists them."""
    from mkdocs.structure.files import get_files

    site = Path(config["site_dir"])
    lines = [f"# Backtalk {__version__}", "", f"> {config['site_description']}", ""]
    files = on_files(get_files(config), config)
    for title, uri in nav_pages(config["nav"]):
        file = files.get_file_from_path(uri)
        text = file.content_string if file else ""
        twin = site / twin_of(uri)
        twin.parent.mkdir(parents=True, exist_ok=True)
        twin.write_text(text)
        lines.append(f"- [{title}]({twin_of(uri)}): {first_sentence(text)}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n")


def twin_of(uri: str) -> str:
    """Return the address of a page's Markdown."""
    return re.sub(r"README\.md$", "index.md", uri)


def nav_pages(nav: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield title and file of each page."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield title, target
            else:
                yield from nav_pages(target)


def first_sentence(text: str) -> str:
    """Return the first sentence of a page's first paragraph."""
    blocks = (block.strip() for block in FENCE.sub("", text).split("\n\n"))
    paragraph = next((block for block in blocks if re.match(r"[\w`\[*“\"]", block)), "")
    sentence = re.split(r"(?<=[.:])\s", " ".join(paragraph.split()))[0]
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", sentence)


def outside_links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield files outside docs/ that a page links to, with their place in the site."""
    for match in LINK.finditer(FENCE.sub("", page.read_text())):
        target = (page.parent / match["path"]).resolve()
        if target.is_dir() and (target / "README.md").is_file():
            target /= "README.md"
        if target.is_file() and not target.is_relative_to(ROOT / "docs") and target.is_relative_to(ROOT):
            yield target, uri_of(target)


def uri_of(target: Path) -> str:
    """Return the place in the site of a file of the repository."""
    if target.is_relative_to(ROOT / "docs"):
        return target.relative_to(ROOT / "docs").as_posix()
    known = {"CHANGELOG.md": "changelog.md", "README.md": "README.md"}
    path = target.relative_to(ROOT).as_posix()
    return known.get(path, f"source/{path}")


def inside(match: re.Match[str], here: Path, uri: str) -> str:
    """Return a link's target, relative to the page at ``uri``."""
    target = (here.parent / match["path"]).resolve()
    if target.is_dir() and (target / "README.md").is_file():
        target /= "README.md"
    if not target.is_file() or not target.is_relative_to(ROOT):
        return match[0]
    return os.path.relpath(uri_of(target), os.path.dirname(uri) or ".") + (match["anchor"] or "")


def recipes() -> str:
    """Return a page with the heading and the first paragraph of each recipe."""
    lines = ["# Recipes", "", "Runs with the command, the hardware, the minutes and the numbers to expect.", ""]
    for path in sorted((ROOT / "recipes").glob("*/README.md")):
        title = path.read_text().splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}](source/recipes/{path.parent.name}/README.md): {first_sentence(path.read_text())}")
    return "\n".join(lines) + "\n"


def settings() -> str:
    """Return a page of all settings with types, defaults and what they mean, by group."""
    from backtalk.run.config import setting_schemas

    lines, group = ["# All settings", "", STAMP + "[Settings](../settings.md) says where they are written.", ""], None
    for key, schema in setting_schemas("torch").items():
        section = key.rpartition(".")[0] or "run"
        if section != group:
            group = section
            lines += [f"## {group}", "", "| setting | type | default | |", "|---|---|---|---|"]
        default = json.dumps(schema["default"]) if "default" in schema else "none: it has to be given"
        cells = [f"`{key}`", kind_of(schema), f"`{default}`", " ".join(schema.get("description", "").split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def kind_of(schema: dict[str, Any]) -> str:
    """Return the type of a setting in words."""
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind_of(choice) for choice in schema["anyOf"]))
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"list of {kind_of(schema['items'])}"
    return str(schema.get("type", schema.get("$ref", "any").rpartition("/")[2]))


def commands() -> str:
    """Return a page of all commands with their arguments and options."""
    import typer

    from backtalk.cli.app import app

    lines = ["# Commands", "", STAMP + "`backtalk COMMAND --help` prints the same.", ""]
    for name, command in each_command(typer.main.get_command(app), "backtalk"):
        lines += [
            f"## {name}",
            "",
            "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n")),
            "",
        ]
        rows = [param for param in command.params if not getattr(param, "hidden", False) and param.name != "help"]
        lines += ["| | |", "|---|---|"] if rows else []
        for param in rows:
            names = ", ".join(f"`{opt}`" for opt in (*param.opts, *param.secondary_opts))
            if param.param_type_name == "argument":
                names = f"`{param.metavar or param.name.upper()}`"
            lines.append(f"| {names} | {' '.join((getattr(param, 'help', '') or '').split())} |".replace("<", "&lt;"))
        lines.append("")
    return "\n".join(lines)


def each_command(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the commands below a group, with what to type."""
    for sub, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from each_command(inner, f"{name} {sub}")
        else:
            yield f"{name} {sub}", inner


def python() -> str:
    """Return a page of the classes and functions that programs use."""
    lines = ["# Python", "", STAMP + "Everything is imported from its own module.", ""]
    for title, modules in PYTHON.items():
        lines += [f"## {title}", ""] + [f"::: {module}\n" for module in modules]
    return "\n".join(lines)
