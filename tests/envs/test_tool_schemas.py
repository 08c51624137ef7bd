"""Schemas of tools: references, what is left out of a prompt, and texts that are too long for one."""

from __future__ import annotations

from typing import Any

from backtalk.envs.tool_schemas import plain_schema, resolve_reference
from backtalk.messages import Part, truncate_text
from backtalk.trajectory import TokenRole

ENV, WARNING = TokenRole.ENV_OUTPUT, TokenRole.WARNING


def test_references_of_any_place_are_replaced_by_what_they_name() -> None:
    document = {
        "$defs": {"Street": {"type": "string", "title": "Street"}},
        "components": {"schemas": {"a/b~c": {"$ref": "#/$defs/Street"}}},
    }
    schema = {
        "title": "Address",
        "properties": {
            "title": {"$ref": "#/components/schemas/a~1b~0c", "description": "of honour"},
            "lost": {"$ref": "#/$defs/Nowhere"},
            "many": {"type": "array", "items": {"$ref": "#/$defs/Street"}},
        },
        "required": ["title"],
        "examples": [{"title": "x"}],
        "default": {"title": "y"},
    }
    assert plain_schema(schema, document) == {
        "properties": {
            "title": {"type": "string", "description": "of honour"},
            "lost": {},
            "many": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["title"],
        "default": {"title": "y"},
    }
    assert resolve_reference({"type": "object"}, document) == {"type": "object"}


def test_a_schema_that_contains_itself_ends() -> None:
    document = {"$defs": {"Node": {"properties": {"next": {"$ref": "#/$defs/Node"}}}}}
    node = plain_schema({"$ref": "#/$defs/Node"}, document)
    depth = 0
    while node:
        node, depth = node["properties"]["next"], depth + 1
    assert depth == 8


def test_a_long_text_keeps_what_was_asked_for() -> None:
    notice = Part("\n[6 characters left out]\n", WARNING)
    assert truncate_text("0123456789", 4, ENV) == [Part("01", ENV), notice, Part("89", ENV)]
    on_its_own_line = Part("[6 characters left out]\n", WARNING)
    assert truncate_text("0\n23456789", 4, ENV)[1] == on_its_own_line
    head = [Part("0123", ENV), Part("\n[6 characters left out at the end]\n", WARNING)]
    assert truncate_text("0123456789", 4, ENV, "head") == head
    tail = [Part("[6 characters left out at the beginning]\n", WARNING), Part("6789", ENV)]
    assert truncate_text("0123456789", 4, ENV, "tail") == tail
    assert truncate_text("0123", 4, ENV) == [Part("0123", ENV)] and truncate_text("", 4, ENV) == []


def test_a_text_that_lacks_bytes_says_where() -> None:
    def cut(at: int, keep: Any = "both", max_chars: int = 4) -> list[str]:
        return [part.text for part in truncate_text("0123456789", max_chars, ENV, keep, dropped_bytes=7, dropped_at=at)]

    assert cut(5) == ["01", "\n[6 characters and 7 bytes left out]\n", "89"]  # within what is left out anyway
    assert cut(10) == ["01", "\n[6 characters left out]\n", "89", "\n[7 bytes left out at the end]\n"]
    assert cut(5, "tail") == ["[6 characters and 7 bytes left out at the beginning]\n", "6789"]
    assert cut(5, "head") == ["0123", "\n[6 characters and 7 bytes left out at the end]\n"]
    assert cut(5, max_chars=10) == ["01234", "\n[7 bytes left out]\n", "56789"]
