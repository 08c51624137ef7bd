"""Running a scenario's verifiers: Python source that is given the database before and after as files."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from backtalk.errors import VerifierError

COMPLETE, OTHERS = "complete", "others"  # the two results of a code verifier


def run_verifier(source: str, mode: str, before: Path, after: Path, answer: str | None) -> dict[str, Any]:
    """What a verifier found: ``{"result": "complete" | "others"}`` in code mode, facts for a judge in sql mode.

    The function is the first whose name begins with ``verify_``; it gets those of ``initial_db_path``,
    ``final_db_path`` and ``final_answer`` that it names. It runs with the rights of this process.

    Raises:
        VerifierError: it crashed, or gave something else. That is no reward at all, never a reward of 0.
    """
    names = re.findall(r"^def (verify_\w+)\(", source, re.MULTILINE)
    if not names:
        raise VerifierError("the verifier has no function verify_...; a task without one cannot be scored")
    namespace: dict[str, Any] = {}
    given = {"initial_db_path": str(before), "final_db_path": str(after), "final_answer": answer or ""}
    try:
        exec("import json, os, re, sqlite3", namespace)  # which published verifiers take for granted
        exec(compile(source, f"<{names[0]}>", "exec"), namespace)
        verify = namespace[names[0]]
        wanted = inspect.signature(verify).parameters
        found = verify(**{name: value for name, value in given.items() if name in wanted})
    except Exception as error:
        raise VerifierError(f"{names[0]} crashed: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or (mode == "code" and found.get("result") not in (COMPLETE, OTHERS)):
        raise VerifierError(f"{names[0]} gave {str(found)[:200]!r}, which is neither {COMPLETE!r} nor {OTHERS!r}")
    return found
