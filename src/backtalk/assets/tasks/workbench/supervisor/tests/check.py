import json
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True
import fence  # noqa: E402

KEEPER, ROOT = "/home/agent/keeper/keeper.py", "/tmp/judge"
SLACK_S = 15.0  # a busy machine may be this late
EARLY_S = 0.02  # clocks are read at two places


class Wrong(Exception):
    """Something does not hold, which decides the whole."""


wrong = threading.Event()


def expect(what, holds):
    if not holds:
        wrong.set()
        raise Wrong(what)


class Keeper:
    """keeper.py with programs of the tests, in a folder of its own; each program is PROGRAM with a way to behave."""

    def __init__(self, name, programs):
        self.folder = f"{ROOT}/{name}"
        os.makedirs(self.folder)
        shutil.copyfile("/tests/program.py", f"{self.folder}/program.py")
        entries = []
        for program, (behaviour, stop_s) in programs.items():
            command = behaviour if isinstance(behaviour, list) else ["python3", "-I", "program.py", program, behaviour]
            entries.append({"name": program, "command": command, "stop_s": stop_s})
        with open(f"{self.folder}/programs.json", "w") as file:
            json.dump(entries, file)
        self.output = f"{self.folder}/output"
        with open(self.output, "wb") as output:
            env = {"PATH": os.environ["PATH"], "GREETING": "hello"}
            self.process = fence.start(["python3", KEEPER, "programs.json"], cwd=self.folder, env=env, stdout=output)
        keepers.append(self)

    def lines(self):
        """What keeper has printed, line by line, in words."""
        with open(self.output, encoding="utf-8", errors="replace") as file:
            return [line.split() for line in file.read(1 << 20).split("\n")[:-1]]

    def notes(self, program, what):
        """The times at which a program wrote down something, with the process that did."""
        try:
            with open(f"{self.folder}/{program}.notes") as file:
                rows = [line.split() for line in file.read().split("\n")[:-1]]
        except OSError:
            return []
        return [(float(at), int(process)) for word, at, process in rows if word == what]

    def until(self, holds, seconds=SLACK_S):
        """Wait until something holds; whether it did. Not longer than the rest is right."""
        until_s = min(time.monotonic() + seconds, fence.END_S)
        while not (held := holds()) and time.monotonic() < until_s and not wrong.is_set():
            time.sleep(0.03)
        return held

    def send(self, number):
        os.kill(self.process.pid, number)

    def ends_well(self):
        return self.until(lambda: self.process.poll() is not None) and self.process.returncode == 0


def is_there(process):
    """Whether there is such a process, and no zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def zombies_of(parent):
    found = []
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{int(entry)}/stat") as file:
                state, above, *_ = file.read().rpartition(")")[2].split()
        except (ValueError, OSError):
            continue
        if state == "Z" and int(above) == parent:
            found.append(int(entry))
    return found


def restarts():
    """Points 1, 2, 3, 7 and 9: crashes are started again after their delays, by exit and by signal; a good end is one."""
    k = Keeper(
        "restarts",
        {
            "exits": ("exit 3", 1.0),
            "killed": ("kill", 1.0),
            "absent": (["/nonexistent/program"], 1.0),
            "once": ("exit 0", 1.0),
            "stays": ("stay", 5.0),
        },
    )
    begin_s = time.monotonic()
    for program in ("exits", "killed"):
        expect(f"{program} is started five times", k.until(lambda: len(k.notes(program, "start")) >= 5, 25))
        begins, ends = (k.notes(program, what) for what in ("start", "end"))
        waits = [begin - end for (begin, _), (end, _) in zip(begins[1:5], ends)]
        expect(f"{program} waits {waits}", all(w >= d - EARLY_S for w, d in zip(waits, (0.2, 0.4, 0.8, 1.6))))
        expect(f"{program} waits no longer {waits}", sum(waits) < 3.0 + SLACK_S)
    expect("once and stays are started once", len(k.notes("once", "start")) == len(k.notes("stays", "start")) == 1)
    expect("no zombies", k.until(lambda: not zombies_of(k.process.pid)))
    lines = k.lines()
    started = [int(line[2]) for line in lines if line[:2] == ["started", "exits"]]
    expect("lines of what started", started[:5] == [process for _, process in k.notes("exits", "start")][:5])
    names = ("exits", "killed", "once", "absent")
    ended = {name: {line[2] for line in lines if line[:2] == ["ended", name]} for name in names}
    right = {"exits": {"3"}, "killed": {"-9"}, "once": {"0"}, "absent": {"127"}}
    expect(f"lines of what ended {ended}", ended == right)
    absent, most = sum(line[:2] == ["ended", "absent"] for line in lines), 5 + (time.monotonic() - begin_s) / 1.6
    expect(f"what cannot be started was tried {absent} times, at most {most}", 4 <= absent <= most)
    ((_, process),) = k.notes("stays", "start")
    expect("a process group of its own", os.getpgid(process) == process)
    expect("environment and folder", k.notes("stays", "hello"))
    k.send(signal.SIGTERM)
    expect("status 0", k.ends_well())
    expect("stays is gone", not is_there(process))


def stops():
    """Point 4: SIGTERM goes on to the groups, with patience, then SIGKILL; nothing stays, nothing is started."""
    k = Keeper(
        "stops",
        {
            "polite": ("slow", 30.0),
            "deaf": ("deaf", 1.0),
            "family": ("family", 30.0),
            "orphans": ("deaf family", 1.0),
            "flaky": ("exit 1", 1.0),
        },
    )
    names, families = ("polite", "deaf", "family", "orphans"), ("family", "orphans")
    expect("all are started", k.until(lambda: all(k.notes(name, "ready") for name in names)))
    expect("children too", k.until(lambda: all(k.notes(name, "child") for name in families)))
    expect("crashes", k.until(lambda: len(k.notes("flaky", "end")) >= 3))
    sent_s = time.monotonic()
    k.send(signal.SIGTERM)
    expect("status 0", k.ends_well())
    took_s = time.monotonic() - sent_s
    every = [process for name in names for what in ("start", "child") for _, process in k.notes(name, what)]
    expect("nothing is left", not any(map(is_there, every)))
    expect("polite may end by itself", k.notes("polite", "term") and k.notes("polite", "bye"))
    expect("children get the signal", k.notes("family", "child-term"))
    expect(f"patience: {took_s}", 1.0 - EARLY_S <= took_s < 1.5 + SLACK_S)
    expect("it says so", ["stopping"] in k.lines())
    count = len(k.notes("flaky", "start"))
    time.sleep(1.7)
    expect("nothing is started any more", len(k.notes("flaky", "start")) == count)


def hangs_up():
    """Points 5 and 4: SIGHUP reaches every group and nothing is restarted; SIGINT is as good as SIGTERM."""
    k = Keeper("hangs_up", {"one": ("stay", 5.0), "two": ("family", 5.0)})
    expect("ready", k.until(lambda: k.notes("one", "ready") and k.notes("two", "ready") and k.notes("two", "child")))
    for count in (1, 2):
        k.send(signal.SIGHUP)
        told = (("one", "hup"), ("two", "hup"), ("two", "child-hup"))
        expect(f"signal {count}", k.until(lambda: all(len(k.notes(*who)) == count for who in told)))
    expect("none is started again", len(k.notes("one", "start")) == len(k.notes("two", "start")) == 1)
    k.send(signal.SIGINT)
    expect("status 0", k.ends_well())
    expect("SIGINT is passed on as SIGTERM", k.notes("one", "term"))


def leaves_nothing():
    """Points 6 and 8: what is left of a group is killed when its program ends; when all are done, so is keeper."""
    k = Keeper("leaves_nothing", {"parent": ("leave 0", 1.0), "other": ("exit 0", 1.0)})
    expect("status 0 when all are done", k.ends_well())
    expect("its child is gone", k.until(lambda: not is_there(k.notes("parent", "child")[0][1]), 3))
    k = Keeper("leaves_nothing_of_a_crash", {"crash": ("leave 4", 1.0)})
    expect("started again", k.until(lambda: len(k.notes("crash", "start")) >= 2))
    expect("its child is gone by then", not is_there(k.notes("crash", "child")[0][1]))
    k.send(signal.SIGTERM)
    expect("status 0", k.ends_well())


def begins_anew():
    """Point 2: after 5 s of life the delay is the first one again. Three try it, so that one pause spoils nothing."""
    k = Keeper("begins_anew", {f"long{life}": (f"crashes {life}", 1.0) for life in (3, 4, 5)})
    short = []
    for life in (3, 4, 5):
        name, least = f"long{life}", [0.2, 0.4, 0.8, 1.6][: life - 1]
        expect(f"{name} is started again", k.until(lambda: len(k.notes(name, "start")) > life, 30))
        begins, ends = (k.notes(name, what) for what in ("start", "end"))
        waits = [begin - end for (begin, _), (end, _) in zip(begins[1 : life + 1], ends)]
        expect(f"{name} waits {waits}", all(wait >= d - EARLY_S for wait, d in zip(waits, [*least, 0.2])))
        short.append(waits[-1] < min(2 * least[-1], 1.6) - EARLY_S)
    expect("one of the last waits is short again", any(short))
    k.send(signal.SIGTERM)
    expect("status 0", k.ends_well())


def bury():
    """Orphans become children of this process: take them off the list when they end, as an init does."""
    kept = {keeper.process.pid for keeper in keepers}
    for process in set(zombies_of(os.getpid())) - kept:
        try:
            os.waitpid(process, os.WNOHANG)
        except ChildProcessError:
            pass


def holds(part):
    try:
        part()
    except (Wrong, OSError, ValueError, IndexError) as error:
        print(f"{part.__name__}: {error!r}")
        wrong.set()


keepers = []
parts = (restarts, stops, hangs_up, leaves_nothing, begins_anew)
with ThreadPoolExecutor(len(parts)) as threads:
    running = [threads.submit(holds, part) for part in parts]
    while not all(part.done() for part in running):
        bury()
        time.sleep(0.05)
fence.score(right=not wrong.is_set())
