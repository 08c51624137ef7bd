"""Writes two months of backups of a small office, some of them damaged. The tests know what was saved from here too."""

import gzip
import hashlib
import io
import os
import random
import tarfile
import time
from dataclasses import dataclass

FOLDER = "/home/agent/backup"
START_S = 1_687_500_000

README = """\
# Backups of the office

Every archive is a tar file, some compressed with gzip. `catalog.tsv` has one line per archive, separated by tabs:

    NAME  TAKEN  BASE  SHA256

TAKEN is when it was taken (UTC). BASE is `-` for a full backup, which holds every file. Any other archive holds only
what changed since its BASE was taken: the files that are new or changed, whole, and, where something was deleted since
then, a member `.deleted` with the paths that were deleted, one a line, as members are named. A file that was deleted can
come back later. To get back what there was when an archive was taken, its base is restored first, which may have a base
itself, and so on.

SHA256 is that of the archive as it was written. Disks being what they are, an archive may have been damaged since: one
whose sum is another now must not be trusted, even if it can be unpacked.
"""


@dataclass(frozen=True)
class Saved:
    content: bytes
    mode: int
    mtime: int


@dataclass(frozen=True)
class Archive:
    name: str
    taken: int
    base: str | None
    state: dict  # everything there was, by path
    data: bytes  # as written
    damage: str = ""


def history():
    """All archives in the order they were taken, and what there was at each. The same on every machine."""
    rng = random.Random(31)
    state, archives = {}, {}
    people = ["ines", "bo", "cleo"]

    def text(path, day):
        return "".join(f"{path} day {day} {rng.random():.6f}\n" for _ in range(2 + day % 4)).encode()

    def save(day, names):
        for name in names:
            state[name] = Saved(text(name, day), rng.choice([0o644, 0o600, 0o755]), START_S + day * 86_400 - 3_000)

    def take(name, day, base=None, damage=""):
        before = archives[base].state if base else {}
        members = {path: saved for path, saved in state.items() if before.get(path) != saved}
        deleted = sorted(set(before) - set(state))
        if deleted:
            listing = "".join(f"{path}\n" for path in deleted).encode()
            members[".deleted"] = Saved(listing, 0o644, START_S + day * 86_400)
        data = _tar(members)
        data = gzip.compress(data, mtime=0) if name.endswith("gz") else data
        archives[name] = Archive(name, START_S + day * 86_400, base, dict(state), data, damage)

    save(0, [f"books/{year}/q{quarter}.csv" for year in (2021, 2022) for quarter in (1, 2, 3, 4)])
    save(0, [f"mail/{person}/{box}.mbox" for person in people for box in ("in", "sent")])
    save(0, ["books/index.txt", "books/rules of accounting.txt", "bookshelf/list.txt", "notes/todo.txt"])
    take("office-a.tar.gz", 0)
    save(2, ["books/2023/q1.csv", "mail/bo/in.mbox", "books/index.txt"])
    del state["notes/todo.txt"]
    take("office-b.tar", 2, "office-a.tar.gz")
    save(5, ["books/2023/q1.csv", "books/2023/draft.csv", "mail/cleo/in.mbox"])
    del state["books/2021/q1.csv"]
    take("office-c.tar.gz", 5, "office-b.tar")
    save(9, ["books/2023/q2.csv", "books/rules of accounting.txt", "notes/todo.txt"])
    del state["books/2023/draft.csv"], state["mail/bo/sent.mbox"]
    take("office-f.tar", 9, "office-c.tar.gz")
    save(11, ["books/index.txt", "books/2022/q4.csv", "books/2023/draft.csv"])
    take("office-d.tar.gz", 11, "office-f.tar", damage="cut")
    save(14, ["books/2023/q2.csv", "books/2021/q1.csv"])
    del state["books/2022/q2.csv"]
    take("office-e.tar", 14, "office-f.tar")  # not on the one before it, which is why it can be had
    save(17, ["books/2023/q3.csv", "mail/ines/in.mbox", "books/index.txt"])
    del state["books/2023/draft.csv"], state["books/2021/q2.csv"]
    take("office-k.tar.gz", 17, "office-e.tar")
    save(21, ["books/2023/q3.csv", "books/index.txt", "bookshelf/list.txt"])
    state["books/2023/private/wages.csv"] = Saved(b"much\n", 0o600, START_S + 20 * 86_400)
    take("office-g.tar", 21, damage="bit")  # a full one, which unpacks without a word
    save(24, ["books/2023/q3.csv", "mail/bo/in.mbox"])
    take("office-h.tar.gz", 24, "office-g.tar")
    save(26, ["books/2023/q4.csv"])
    take("office-i.tar", 26, "office-k.tar.gz", damage="bit")
    save(27, ["books/2023/q4.csv", "books/index.txt"])
    take("office-j.tar.gz", 27, "office-i.tar")
    return archives


def _tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, saved in sorted(members.items()):
            info = tarfile.TarInfo(path)
            info.size, info.mode, info.mtime = len(saved.content), saved.mode, saved.mtime
            info.uid = info.gid = 1000
            info.uname = info.gname = "agent"
            tar.addfile(info, io.BytesIO(saved.content))
    return buffer.getvalue()


def on_disk(archive):
    """The archive as it is now."""
    match archive.damage:
        case "cut":
            return archive.data[: len(archive.data) * 2 // 3]
        case "bit":
            at = archive.data.rindex(b" day ") + 8
            return archive.data[:at] + bytes([archive.data[at] ^ 1]) + archive.data[at + 1 :]
        case _:
            return archive.data


def catalog(archives):
    lines = []
    for archive in sorted(archives.values(), key=lambda archive: archive.name):
        taken = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(archive.taken))
        lines.append("\t".join([archive.name, taken, archive.base or "-", hashlib.sha256(archive.data).hexdigest()]))
    return "".join(f"{line}\n" for line in lines)


def files():
    """What is in the folder of backups by name."""
    archives = history()
    there = {name: on_disk(archive) for name, archive in archives.items()}
    return there | {"catalog.tsv": catalog(archives).encode(), "README.md": README.encode()}


if __name__ == "__main__":
    os.makedirs(FOLDER)
    for name, content in files().items():
        with open(f"{FOLDER}/{name}", "wb") as file:
            file.write(content)
