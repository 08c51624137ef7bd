import os
import posixpath
import stat
import sys

sys.dont_write_bytecode = True
import fence  # noqa: E402
from make_world import KEEP, NEW_PROJECT, OLD_S, OUTSIDE, SHARE, tree  # noqa: E402

ENTRIES = tree()
TOOL = "bin/new-project"


def is_below(path, name, *, itself):
    parts = path.split("/")
    return name in (parts if itself else parts[:-1])


def right_mode(path, mode, is_folder, is_program=False, *, is_private=False):
    """The mode that the policy asks for of one whose mode is ``mode``."""
    private = is_private or is_below(path, "private", itself=is_folder)
    inbox = is_below(path, "inbox", itself=is_folder)
    public = is_below(path, "public", itself=is_folder)
    owner, group, others = 7 if is_folder else 6, mode >> 3 & 0o7, 0
    group = (7 if is_folder else group | 6) if inbox else group & ~2
    if public:
        others = 5 if is_folder else 4
    if private:
        group = others = 0
    if not is_folder:
        owner, group, others = (bits & ~1 | (1 if is_program and bits & 4 else 0) for bits in (owner, group, others))
    special = 0
    if is_folder:
        special = 0o2000 | (0o1000 if posixpath.basename(path) == "inbox" else 0)
    return special | owner << 6 | group << 3 | others


def right_link(path, target):
    """What a link has to say; None where it has to go."""
    place = posixpath.normpath(posixpath.join(SHARE, posixpath.dirname(path), target))
    inside = posixpath.relpath(place, SHARE)
    if (inside != "." and inside not in ENTRIES) or inside.startswith(".."):
        return None
    return posixpath.relpath(place, posixpath.join(SHARE, posixpath.dirname(path)))


def expected():
    """What has to be there by path: (kind, mode, content or target, names of the same file)."""
    names = {}
    for path, entry in ENTRIES.items():
        names.setdefault(entry.same_as or path, []).append(path)
    right = {}
    for first, every in names.items():
        entry = ENTRIES[first]
        is_private = any(is_below(path, "private", itself=False) for path in every)
        for path in every:
            mode, content = entry.mode, entry.content
            if entry.kind == "link":
                content = content if path in KEEP else right_link(path, content)
                if content is None:
                    continue
            elif path not in KEEP:
                program = content.startswith("#!")
                mode = right_mode(path, mode, entry.kind == "folder", program, is_private=is_private)
            right[path] = (entry.kind, mode, content, sorted(every))
    return right


def found(root):
    """What is there, in the same form; the content of what cannot be read is None."""
    right, nodes = {}, {}
    for folder, folders, files in os.walk(root):
        for name in [".", *folders, *files]:
            place = posixpath.normpath(f"{folder}/{name}")
            path = "" if place == root else posixpath.relpath(place, root)
            try:
                state = os.lstat(place)
            except OSError as error:
                right[path] = [str(error), 0, None, []]
                continue
            if stat.S_ISLNK(state.st_mode):
                right[path] = ["link", 0, os.readlink(place), [path]]
            elif stat.S_ISDIR(state.st_mode):
                right[path] = ["folder", stat.S_IMODE(state.st_mode), "", [path]]
            elif stat.S_ISREG(state.st_mode) and state.st_size < 100_000:
                nodes.setdefault(state.st_ino, []).append(path)
                dated = path == TOOL or root != SHARE or state.st_mtime == OLD_S
                right[path] = [
                    "file",
                    stat.S_IMODE(state.st_mode),
                    text_of(place) if dated else "date",
                    nodes[state.st_ino],
                ]
            else:
                right[path] = ["something else", 0, None, []]
    return {path: (kind, mode, text, sorted(set(same))) for path, (kind, mode, text, same) in right.items()}


def text_of(place):
    try:
        with open(place, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except OSError:
        return None


def project_is_right(name, umask):
    """Run the tool in another share, and look at what it made."""
    other = f"/tmp/judge-{name}/share"
    os.makedirs(f"{other}/bin")
    os.makedirs(f"{other}/projects")
    with open(f"{other}/{TOOL}", "w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(text_of(f"{SHARE}/{TOOL}") or "")
    os.chmod(f"{other}/{TOOL}", 0o750)
    os.chmod(f"{other}/projects", 0o2750)
    status, output = fence.run(
        ["bash", "-c", f"umask {umask:03o}; exec {other}/{TOOL} {name}"], env={"PATH": os.environ["PATH"]}
    )
    files = {
        "README.txt": f"project {name}\n",
        "public/index.html": "nothing yet\n",
        "private/keys.txt": f"keys of {name}\n",
        "run.sh": f"#!/bin/sh\necho {name}\n",
    }
    made = found(f"{other}/projects/{name}")
    right = set(made) == {"", "inbox", "private", "public", *files}
    for path, (kind, mode, text, same) in made.items():
        conforms = mode == right_mode(path, mode, kind == "folder", path == "run.sh")
        right &= (
            conforms
            and same == [path]
            and text == files.get(path, "")
            and kind == ("file" if path in files else "folder")
        )
    if not right:
        print(
            name,
            f"umask {umask:03o}",
            status,
            output[-300:],
            {path: f"{mode:o}" for path, (_, mode, *_) in made.items()},
        )
    return right


def outside_is_right():
    for path, mode in ((OUTSIDE, 0o777), (f"{OUTSIDE}/drive.txt", 0o666), (f"{OUTSIDE}/run.sh", 0o666)):
        if stat.S_IMODE(os.lstat(path).st_mode) != mode:
            return False
    return sorted(os.listdir(OUTSIDE)) == ["drive.txt", "run.sh"] and text_of(f"{OUTSIDE}/run.sh") == "not yours\n"


right, given = expected(), found(SHARE)
kind, mode, _, same = right[TOOL]
changed = text_of(f"{SHARE}/{TOOL}")
right[TOOL] = (kind, mode, changed, same)
wrong = sorted(path for path in {*right, *given} if right.get(path) != given.get(path))
for path in wrong[:20]:
    print(repr(path), "is", given.get(path), "and it should be", right.get(path))
tool = changed not in (None, NEW_PROJECT) and all(
    project_is_right(name, umask)
    for name, umask in (("quarry", 0o000), ("ferry-2", 0o022), ("kiln", 0o077), ("lock", 0o027))
)
fence.score(share=not wrong, outside=outside_is_right(), tool=tool)
