"""An observation's fields as the parts of a message: who said what, by a map from field to role."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from backtalk.envs.openenv.config import DEFAULT_ROLES, ROLES
from backtalk.messages import Part, truncate_text
from backtalk.trajectory import TokenRole


def observe(observation: Mapping[str, Any], roles: Mapping[str, str], max_chars: int) -> tuple[tuple[Part, ...], bool]:
    """The parts, and whether some of the text was left out.

    Text stands as the world wrote it; any other value as JSON. A field alone stands without its name; several have
    their names on lines before them, which are ours and so WARNING. Empty fields are not shown.
    """
    fields = _fields(observation, DEFAULT_ROLES | dict(roles), TokenRole.ENV_OUTPUT)
    shown = [(path, said) for path, value, role in fields if (said := _said(value, role))]
    parts: list[Part] = []
    truncated = False
    for path, said in shown:
        label = f"{path}:\n" if len(shown) > 1 else ""
        for part in said:
            own_line = "\n" if parts and not parts[-1].text.endswith("\n") else ""
            if own_line or label:
                parts.append(Part(own_line + label, TokenRole.WARNING))
            parts += truncate_text(part.text, max_chars, part.role)
            label = ""
            truncated |= len(part.text) > max_chars
    return tuple(parts), truncated


def _fields(
    values: Mapping[str, Any], roles: Mapping[str, str], inherited: TokenRole | None, prefix: str = ""
) -> Iterator[tuple[str, Any, TokenRole]]:
    """Every field that is shown, with its dotted path; objects are opened only where a rule names something inside."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        role = ROLES[roles[path]] if path in roles else inherited
        if isinstance(value, Mapping) and any(rule.startswith(f"{path}.") for rule in roles):
            yield from _fields(value, roles, role, f"{path}.")
        elif role is not None:
            yield path, value, role


def _said(value: Any, role: TokenRole) -> list[Part]:
    """A value as parts: mostly one, none where it is empty; of an MCP tool's result, one for each block."""
    if value is None or value == "" or value == [] or value == {}:
        return []
    if isinstance(value, str):
        return [Part(value, role)]
    blocks = value.get("content") if isinstance(value, Mapping) else None
    if isinstance(blocks, list) and all(isinstance(block, Mapping) and "type" in block for block in blocks):
        return [_block(block, role) for block in blocks if block.get("text") != ""]
    return [Part(json.dumps(value, ensure_ascii=False), role)]


def _block(block: Mapping[str, Any], role: TokenRole) -> Part:
    """Text as it is; of an image or a sound, only that it was there."""
    text = block.get("text")
    return Part(text, role) if isinstance(text, str) else Part(f"[{block['type']} left out]", TokenRole.WARNING)
