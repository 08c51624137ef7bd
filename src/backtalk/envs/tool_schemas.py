"""Makes the JSON schema of a tool's arguments stand by itself, and short, so that it can be put into a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 8  # of references inside references: a schema that contains itself ends there
VALUES = ("const", "default", "enum", "required")  # keywords that hold values, not schemas
NOT_SHOWN = ("title", "example", "examples", "$defs", "definitions", "$schema", "discriminator")


def resolve_reference(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema that a ``$ref`` points to in the document, updated with the keys beside it; {} for no target.

    Source: JSON Schema 2020-12, section 8.2.3; JSON Pointer, RFC 6901.
    """
    pointer = schema.get("$ref")
    if not isinstance(pointer, str):
        return schema
    target: Any = document
    for part in pointer.removeprefix("#").split("/")[1:]:
        target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    found = target if isinstance(target, Mapping) else {}
    return {**found, **{key: value for key, value in schema.items() if key != "$ref"}}


def plain_schema(schema: Any, document: Mapping[str, Any], depth: int = 0) -> Any:
    """Return a schema without references, and without titles and examples, which cost tokens and say little."""
    if isinstance(schema, list):
        return [plain_schema(item, document, depth) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:
        return plain_schema(resolve_reference(schema, document), document, depth + 1) if depth < MAX_DEPTH else {}
    plain = {}
    for key, value in schema.items():
        if key == "properties" and isinstance(value, Mapping):  # whose keys are names, "title" perhaps
            plain[key] = {name: plain_schema(inner, document, depth) for name, inner in value.items()}
        elif key in VALUES:
            plain[key] = value
        elif key not in NOT_SHOWN:
            plain[key] = plain_schema(value, document, depth)
    return plain
