"""`backtalk settings`: list what can be set in a run, for people and for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from backtalk.errors import ConfigError


def settings(
    group: Annotated[
        str | None, typer.Argument(metavar="[GROUP]", help="Settings that begin so, for example objective.world.")
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="KIND", help="torch, tinker, foundry, or module:MyEngineConfig.")
    ] = "torch",
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a settings file instead.")] = False,
) -> None:
    """List the settings of a run with their defaults. Groups that most runs leave alone are one line each.

    `backtalk settings --schema > settings.schema.json`, and `# yaml-language-server: $schema=settings.schema.json` as
    the first line of a YAML file, let an editor complete and check it.
    """
    from backtalk.run.config import OPTION_GROUPS, json_schema, option_group, setting_schemas

    if schema:
        typer.echo(json.dumps(json_schema(engine), indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    schemas = setting_schemas(engine)
    wanted = [key for key in schemas if group is None or f"{key}.".startswith(f"{group}.")]
    if not wanted:
        raise ConfigError(f"no setting begins with {group!r}; type `backtalk settings` for all of them")
    table = Table("setting", "default", "", box=None, pad_edge=False)
    for key in wanted:
        if group is not None or option_group(key) is None:
            default = schemas[key].get("default", {})
            table.add_row(key, "null" if default is None else json.dumps(default), schemas[key].get("description", ""))
    for name in OPTION_GROUPS if group is None else ():
        count = sum(option_group(key) == name for key in schemas)
        table.add_row(f"{name}.*", "", f"{count} more: backtalk settings {name}")
    Console(markup=False, highlight=False).print(table)
