"""Write scenarios as the files of the Agent World Model, which ``backtalk.envs.awm.files.read_scenarios`` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backtalk.envs.awm.files import (
    CODE_VERIFIERS,
    PROGRAMS,
    SAMPLES,
    SCENARIOS,
    SCHEMAS,
    SQL_VERIFIERS,
    TASKS,
    Scenario,
)


def write_scenario(scenario: Scenario, folder: Path) -> None:
    """Write one scenario as the seven files; ``read_scenarios`` returns it unchanged."""
    name = {"scenario": scenario.name}
    tables = [{"name": _table(ddl), "ddl": ddl, "indexes": []} for ddl in scenario.schema]
    inserts: dict[str, list[str]] = {}
    for statement in scenario.inserts:
        inserts.setdefault(_table(statement), []).append(statement)
    sample = {"tables": [{"table_name": table, "insert_statements": rows} for table, rows in inserts.items()]}
    rows: dict[str, Sequence[Mapping[str, Any]]] = {
        SCENARIOS: [{"name": scenario.name, "description": scenario.description}],
        TASKS: [name | {"tasks": list(scenario.tasks)}],
        SCHEMAS: [name | {"db_schema": {"tables": tables}}],
        SAMPLES: [name | {"tables_count": len(inserts), "inserts_count": len(scenario.inserts), "sample_data": sample}],
        PROGRAMS: [name | {"full_code": scenario.program}],
    }
    for mode, file in (("sql", SQL_VERIFIERS), ("code", CODE_VERIFIERS)):
        rows[file] = [
            name | {"task_idx": idx, "task": scenario.tasks[idx], "verification": {"code": code, "raw_response": "{}"}}
            for idx, code in scenario.verifiers.get(mode, {}).items()
        ]
    folder.mkdir(parents=True, exist_ok=True)
    for file, lines in rows.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / file).write_text(text, encoding="utf-8")


def _table(statement: str) -> str:
    match = re.match(r"\s*(?:CREATE TABLE(?: IF NOT EXISTS)?|INSERT INTO)\s+[\"`\[]?(\w+)", statement, re.IGNORECASE)
    return match[1] if match else ""
