import json
import os
import stat
import sys

sys.dont_write_bytecode = True
from make_world import FOLDER, files, history  # noqa: E402

RESTORED = "/home/agent/restored"


def is_whole(archive):
    return not archive.damage and (archive.base is None or is_whole(archives[archive.base]))


def tree(root):
    """Every file below: content, mode and seconds of last change by path. A folder is nothing, and a link is itself."""
    there = {}
    for folder, folders, names in os.walk(root):
        for name in [*names, *(name for name in folders if os.path.islink(f"{folder}/{name}"))]:
            path = f"{folder}/{name}"
            state = os.lstat(path)
            there[os.path.relpath(path, root)] = None
            if stat.S_ISREG(state.st_mode) and state.st_size < 1_000_000:
                with open(path, "rb") as file:
                    there[os.path.relpath(path, root)] = (file.read(), stat.S_IMODE(state.st_mode), int(state.st_mtime))
    return there


archives = history()
newest = max((archive for archive in archives.values() if is_whole(archive)), key=lambda archive: archive.taken)
books = {p: (s.content, s.mode, s.mtime) for p, s in newest.state.items() if p.startswith("books/")}
parts = {"newest": False, "books": False, "backup": False}
try:
    given = tree(RESTORED)
    wrong = sorted(path for path in {*books, *given} if books.get(path) != given.get(path))
    print("not as they should be:", wrong[:20])
    parts["books"] = not wrong
    parts["backup"] = {path: there and there[0] for path, there in tree(FOLDER).items()} == files()
    with open("/home/agent/newest.txt") as file:
        parts["newest"] = file.read().strip() == newest.name
except (OSError, ValueError) as error:
    print(error)
print(parts)
with open("/logs/verifier/reward.json", "w") as file:
    json.dump({"reward": float(all(parts.values())), **{name: float(ok) for name, ok in parts.items()}}, file)
