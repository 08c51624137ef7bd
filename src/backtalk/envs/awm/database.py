"""SQLite databases of episodes: made once from SQL, then copied in memory for each episode."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory

from backtalk.errors import DataError


class EpisodeDatabase(sqlite3.Connection):
    """A database in memory with one connection, which programs may "close" as often as they like.

    It is gone with ``release``.
    """

    def close(self) -> None:
        """What a pool does when it takes a connection back."""
        if self.in_transaction:
            self.rollback()

    def release(self) -> None:
        super().close()


def new_database(image: bytes = b"") -> EpisodeDatabase:
    """An empty database, or a copy of one that was serialised."""
    database = sqlite3.connect(":memory:", factory=EpisodeDatabase, check_same_thread=False)
    if image:
        database.deserialize(image)
    return database


def build_image(schema: Iterable[str], inserts: Iterable[str]) -> bytes:
    """A database from SQL, serialised.

    Raises:
        DataError: a statement that SQLite refuses.
    """
    database = new_database()
    try:
        for statement in (*schema, *inserts):
            try:
                database.execute(statement)
            except sqlite3.Error as error:
                raise DataError(f"SQLite refuses {statement[:200]!r}: {error}") from error
        database.commit()
        return database.serialize()
    finally:
        database.release()


@contextmanager
def as_files(before: bytes, after: bytes) -> Iterator[tuple[Path, Path]]:
    """Two serialised databases as files, which is how verifiers want them."""
    with TemporaryDirectory(prefix="backtalk-awm-") as folder:
        paths = Path(folder, "initial.db"), Path(folder, "final.db")
        for path, image in zip(paths, (before, after), strict=True):
            path.write_bytes(image)
        yield paths


# The database of the episode that is being served, which programs get when they connect. A context variable follows
# the call into the threads that FastAPI runs plain functions in.
current_database: ContextVar[EpisodeDatabase] = ContextVar("current_database")
