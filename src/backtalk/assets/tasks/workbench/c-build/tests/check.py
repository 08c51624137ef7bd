import os
import random
import shutil
import stat
import sys

sys.dont_write_bytecode = True
import fence  # noqa: E402

FOLDER, COPY, JUDGE = "/home/agent/shelf", "/tmp/judge/shelf", "/tmp/judge/table"
FLAGS = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror"]
WRAPPED = [f"-Wl,--wrap={name}" for name in "malloc calloc realloc free strdup strndup".split()]
ENV = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
rng = random.Random(5)


def does(command, folder):
    status, output = fence.run(command, cwd=folder, env=ENV, seconds=40)
    if status != 0:
        print(*command, "gave", status, output[-1500:].decode("utf-8", "replace"))
    return status == 0


def sources():
    """Copy the sources, and nothing that was built from them."""
    os.makedirs(f"{COPY}/src")
    shutil.copyfile(f"{FOLDER}/Makefile", f"{COPY}/Makefile", follow_symlinks=False)
    names = [name for name in sorted(os.listdir(f"{FOLDER}/src")) if name.endswith((".c", ".h"))]
    for name in names:
        state = os.lstat(f"{FOLDER}/src/{name}")
        if stat.S_ISREG(state.st_mode) and state.st_size < 200_000:
            shutil.copyfile(f"{FOLDER}/src/{name}", f"{COPY}/src/{name}")
    return [f"src/{name}" for name in names if name.endswith(".c")]


def conversation():
    """Commands, and what has to be answered."""
    store, lines, answers = {}, [], []
    keys = [f"key{i}" for i in range(400)] + ["k" * 9_000, "k" * 9_000 + "2", "ä", "-", "put"]
    for _ in range(6_000):
        key = rng.choice(keys)
        value = " ".join(
            "".join(rng.choices("abc ö", k=rng.choice([1, 5, 12]))) for _ in range(rng.randint(1, 3))
        ).strip()
        value = "x" * rng.randint(1_000, 40_000) if rng.random() < 0.01 else value or "v"
        match rng.choice("put put put get get drop drop count longest what".split()):
            case "put":
                lines.append(f"put {key} {value}")
                answers.append("replaced" if key in store else "new")
                store[key] = value
            case "get":
                lines.append(f"get {key}")
                answers.append(store.get(key, "nothing"))
            case "drop":
                lines.append(f"drop {key}")
                answers.append("nothing" if store.pop(key, None) is None else "dropped")
            case "count":
                lines.append("count")
                answers.append(str(len(store)))
            case "longest":
                lines.append("longest")
                answers.append(str(max((len(v.encode()) for v in store.values()), default=0)))
            case _:
                lines.append(rng.choice(["fly", "put lonely", "get", "drop", "Count"]))
                answers.append("what?")
    return "\n".join(lines).encode() + b"\n", "\n".join(answers).encode() + b"\n"


def converses():
    given, right = conversation()
    status, output = fence.run([f"{COPY}/build/shelf"], given=given, env=ENV)
    if output != right:
        pairs = zip(output.split(b"\n"), right.split(b"\n"))
        at = next((i for i, (got, want) in enumerate(pairs) if got != want), "the end")
        print("build/shelf gave", status, "and its answers are wrong from number", at)
    return status == 0 and output == right


def table_is_right():
    os.makedirs(JUDGE)
    shutil.copyfile(f"{COPY}/src/table.c", f"{JUDGE}/table.c")
    for name in ("table.h", "judge.c"):
        shutil.copyfile(f"/tests/{name}", f"{JUDGE}/{name}")
    build = ["gcc", *FLAGS, "-o", "judge", "judge.c", "table.c", *WRAPPED]
    return does(build, JUDGE) and does(["./judge"], JUDGE)


parts = dict.fromkeys(("make", "check", "warnings", "program", "table", "clean"), False)
try:
    files = sources()
    parts["make"] = does(["make"], COPY)
    if parts["make"]:
        parts["program"] = converses()
        parts["check"] = does(["make", "check"], COPY)
        parts["warnings"] = does(["gcc", *FLAGS, "-fsyntax-only", *files], COPY)
        parts["table"] = table_is_right()
        parts["clean"] = does(["make", "clean"], COPY) and not os.path.lexists(f"{COPY}/build")
except OSError as error:
    print(error)
fence.score(**parts)
