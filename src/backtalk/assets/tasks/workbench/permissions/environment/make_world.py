"""Builds a shared folder whose permissions have drifted from its policy. The tests know the tree from here too."""

import os
import random
from dataclasses import dataclass

SHARE = "/home/agent/share"
OUTSIDE = "/home/agent/elsewhere"
OLD_S = 1_680_000_000  # time of last change of everything

POLICY = """\
# Permissions in this share

Owner, group and others are those of `ls -l`. What is not said here may be either way, and stays as it is.

1. The owner may read and write everything; in folders the owner may do everything.
2. Others have no permission at all, except below `public` (rule 3). Owner and group keep what they have.
3. In a folder named `public`, at any depth, and for the folder itself: others may read files, and read and enter
   folders. They may never write.
4. The group may write in a folder named `inbox` and to all that is below it, at any depth, and has then all
   permissions on folders there, and reads and writes files. Anywhere else the group may not write.
5. A folder named `private`, and all that is below it, at any depth: neither the group nor others have any
   permission. This rule comes before rules 3 and 4, and rule 4 before rule 3 where they say different things.
6. A file is a program if its first two bytes are `#!`. Whoever may read a program may execute it; nobody may execute
   any other file.
7. Every folder has the set-group-ID bit. A folder named `inbox` has the sticky bit (not the folders in it); no other
   folder has it. No folder has the set-user-ID bit, and no file any of the three bits.
8. A file with several names (hard links) follows rule 5 if one of them is below a `private`; else none of its names is
   below `public` or `inbox`.
9. A symbolic link points to something within the share that exists, and says so relative to the folder it stands in,
   without a detour (`../a` and not `../../share/a`, nor `./../a`). One that points out of the share, or to nothing, is
   removed; the others are put right, and point to the same place as before.
10. What stands in `KEEP` (a path in each line, seen from the share) stays exactly as it is, rules or not; for a folder
    this means the folder alone, not what is in it.

What is outside the share is none of its business, wherever links may point.
"""
KEEP = [
    "projects/harbour/legacy.cgi",
    "projects/mill/inbox",
    "spool",
    "projects/harbour/current",
    "public/notice board.txt",
]
NEW_PROJECT = """\
#!/bin/bash
# new-project NAME: makes projects/NAME in the folder of the share, with an inbox and a private folder.
set -e
share="$(dirname "$(dirname "$(readlink -f "$0")")")"
project="$share/projects/$1"
mkdir -p "$project/inbox" "$project/private" "$project/public"
echo "project $1" > "$project/README.txt"
echo "nothing yet" > "$project/public/index.html"
echo "keys of $1" > "$project/private/keys.txt"
printf '#!/bin/sh\\necho %s\\n' "$1" > "$project/run.sh"
chmod 777 "$project/inbox" "$project/run.sh"
chmod 755 "$project/public"
"""


@dataclass(frozen=True)
class Entry:
    kind: str  # "folder", "file", "link"
    mode: int = 0
    content: str = ""  # of a file; what a link says
    same_as: str = ""  # another name of that file


def _links():
    share = SHARE
    return {
        "projects/harbour/current": f"{share}/projects/harbour/plans",  # kept, though absolute
        "projects/harbour/latest": f"{share}/projects/harbour/plans/draft 3.txt",
        "projects/harbour/docs": "../../projects/harbour/plans",
        "projects/harbour/plans/up": "..",
        "projects/harbour/hosts": "/etc/hosts",
        "projects/mill/gear.dat": "./data/gear.dat",
        "projects/mill/old": "../mill-2015",
        "projects/mill/data/drive": "../../../../elsewhere/drive.txt",
        "projects/mill/-rf": "../../../share/bin",
        "public/start": "../public/site/index.html",
        "public/site/logo": "logo.svg",
        "public/site/self": "../../../share/public/site/-n.html",
        "spool": "/home/agent/elsewhere",
        "staff/anna/private/desk": f"{share}/staff/ben",
        "staff/ben/mail": f"{share}/staff/ben/letters/",
        "elsewhere-too": "/home/agent/share-2/readme.txt",
        "staff/all": "/home/agent/share/../share/staff",
    }


def tree():
    """What is in the share by its path there, "" being the share itself. The same on every machine."""
    rng = random.Random(8080)
    folders = """bin projects projects/harbour projects/harbour/plans projects/harbour/private projects/harbour/inbox
        projects/harbour/inbox/2023 projects/harbour/inbox/private projects/mill projects/mill/data projects/mill/inbox
        projects/mill/public projects/mill/public/inbox projects/mill/private projects/mill/private/public
        projects/mill/inboxes public public/site public/site/deep/er public/site/deep staff staff/anna staff/anna/private
        staff/ben staff/ben/letters staff/ben/publication staff/ben/private-ish archive archive/2022""".split()
    entries = {path: Entry("folder", _drift(rng, True, path)) for path in ["", *folders]}
    names = ["notes.txt", "report 7.txt", "run.sh", "data.csv", "-n.html", "#!", "tool", ".hidden", "two\nlines.txt"]
    for folder in folders:
        for name in rng.sample(names, 3):
            path = f"{folder}/{name}"
            is_program = name in ("run.sh", "tool") or (name == ".hidden" and rng.random() < 0.5)
            content = f"#!/bin/sh\necho {folder}\n" if is_program else f"{path!r}\n"
            content = " " + content if name == "tool" and rng.random() < 0.4 else content
            entries[path] = Entry("file", _drift(rng, False, path, is_program), content)
    extra = {
        "projects/harbour/legacy.cgi": (0o4755, "#!/bin/sh\necho legacy\n"),
        "projects/harbour/plans/draft 3.txt": (0o666, "draft\n"),
        "projects/mill/data/gear.dat": (0o640, "gear\n"),
        "public/notice board.txt": (0o777, "notices\n"),
        "public/site/index.html": (0o600, "<p>hello\n"),
        "public/site/-n.html": (0o646, "<p>n\n"),
        "public/site/logo.svg": (0o755, "<svg/>\n"),
        "staff/anna/private/salary.txt": (0o400, "much\n"),
        "staff/ben/letters/one.txt": (0o060, "dear\n"),
        "archive/2022/ledger": (0o444, "#! a ledger\n"),
        "bin/new-project": (0o755, NEW_PROJECT),
        "POLICY.md": (0o640, POLICY),
        "KEEP": (0o640, "".join(f"{path}\n" for path in KEEP)),
    }
    entries |= {path: Entry("file", mode, content) for path, (mode, content) in extra.items()}
    entries["staff/ben/letters/salary-copy.txt"] = Entry("file", same_as="staff/anna/private/salary.txt")
    entries["archive/gear.dat"] = Entry("file", same_as="projects/mill/data/gear.dat")
    entries |= {path: Entry("link", content=target) for path, target in _links().items()}
    return entries


def _drift(rng, is_folder, path, is_program=False):
    """A mode: often right or nearly so, sometimes far off."""
    parts = path.split("/")
    if is_folder:
        mode = 0o2750 if rng.random() < 0.7 else 0o2710
        mode = 0o2770 if "inbox" in parts else mode
        mode |= 0o1000 if parts[-1] == "inbox" else 0
    else:
        mode = rng.choice([0o640, 0o640, 0o600]) if "inbox" not in parts else 0o660
        mode |= (mode & 0o444) >> 2 if is_program else 0
    mode |= (0o005 if is_folder or is_program else 0o004) if "public" in parts else 0
    mode = mode & ~0o077 if "private" in parts else mode
    if rng.random() < 0.4:
        bit = rng.choice([0o002, 0o004, 0o020, 0o001, 0o010, 0o1000, 0o2000, 0o4000, 0o100, 0o200, 0o006, 0o040])
        mode ^= bit
    return mode


def build():
    """Write the share and what is beside it."""
    os.makedirs(OUTSIDE)
    os.makedirs("/home/agent/share-2")
    for path in (f"{OUTSIDE}/drive.txt", f"{OUTSIDE}/run.sh", "/home/agent/share-2/readme.txt"):
        with open(path, "w") as file:
            file.write("not yours\n")
        os.chmod(path, 0o666)
    os.chmod(OUTSIDE, 0o777)
    entries = tree()
    at = {path: f"{SHARE}/{path}".rstrip("/") for path in entries}
    for path, entry in sorted(entries.items()):
        if entry.kind == "folder":
            os.makedirs(at[path], exist_ok=True)
    for path, entry in entries.items():
        if entry.kind == "link":
            os.symlink(entry.content, at[path])
            os.utime(at[path], (OLD_S, OLD_S), follow_symlinks=False)
        elif entry.same_as:
            os.link(at[entry.same_as], at[path])
        elif entry.kind == "file":
            with open(at[path], "w") as file:
                file.write(entry.content)
            os.utime(at[path], (OLD_S, OLD_S))
            os.chmod(at[path], entry.mode)
    for path in sorted((path for path, entry in entries.items() if entry.kind == "folder"), reverse=True):
        os.utime(at[path], (OLD_S, OLD_S))
        os.chmod(at[path], entries[path].mode)


if __name__ == "__main__":
    build()
