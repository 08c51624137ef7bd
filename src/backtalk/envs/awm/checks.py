"""Verifiers of our own worlds, written as the published ones are: functions of two database files and an answer.

A right attempt leaves the database that it began with and the changes that were asked for: nothing less, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

_CODE = """\
def verify_task_completion(initial_db_path: str, final_db_path: str, final_answer: str | None = None) -> dict:
    import re
    import sqlite3

    CHANGES = {changes}
    ANSWER = {answer!r}
    AMONG = {among}

    def contents(path, changes=()):
        stored, database = sqlite3.connect(f"file:{{path}}?mode=ro", uri=True), sqlite3.connect(":memory:")
        stored.backup(database)
        stored.close()
        for statement in changes:
            database.execute(statement)
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {{name: sorted(map(repr, database.execute(f'SELECT * FROM "{{name}}"'))) for name in tables}}
        database.close()
        return rows

    done = contents(initial_db_path, CHANGES) == contents(final_db_path)
    said = (final_answer or "").lower()
    if ANSWER is None:
        right = True
    elif ANSWER.isdigit():
        right = set(re.findall(r"[0-9]+(?:[.][0-9]+)?", said)) == {{ANSWER}}
    else:
        right = set(re.findall("[a-z]+", said)) & set(AMONG) == {{ANSWER}}
    return {{"result": "complete" if done and right else "others"}}
"""

# For a judge, who sees what changed and reads the answer in the conversation.
SQL_VERIFIER = """\
def verify_task(initial_db_path: str, final_db_path: str) -> dict:
    import sqlite3

    def contents(path):
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: set(map(repr, database.execute(f'SELECT * FROM "{name}"'))) for name in tables}
        database.close()
        return rows

    before, after = contents(initial_db_path), contents(final_db_path)
    return {
        name: {"removed": sorted(rows - after[name]), "added": sorted(after[name] - rows)}
        for name, rows in before.items()
        if rows != after[name]
    }
"""


def code_verifier(changes: Sequence[str] = (), answer: str | None = None, among: Sequence[str] = ()) -> str:
    """Source of a verifier: the database has to be what it was after ``changes`` (SQL), and the answer right.

    A number has to be the only one in the answer; a word the only one of those it is ``among``. None is any answer.
    """
    return _CODE.format(changes=repr(list(changes)), answer=answer, among=repr(list(among)))
