"""A program for keeper to keep: program.py NAME BEHAVIOUR. Writes down what happens to it, in NAME.notes."""

import os
import signal
import sys
import time

name, behaviour = sys.argv[1:]


def note(what):
    with open(f"{name}.notes", "a") as file:
        file.write(f"{what} {time.monotonic()} {os.getpid()}\n")


def listen(prefix="", *, ends=True, takes_s=0.0):
    def term(number, frame):
        note(f"{prefix}term")
        if ends:
            time.sleep(takes_s)
            note(f"{prefix}bye")
            os._exit(0)

    signal.signal(signal.SIGTERM, term)
    signal.signal(signal.SIGHUP, lambda number, frame: note(f"{prefix}hup"))


def child(*, ends=True):
    if os.fork() == 0:
        listen("child-", ends=ends)
        note("child")
        sleep()


def sleep():
    while True:
        time.sleep(60)


note("start")
if os.environ.get("GREETING"):
    note(os.environ["GREETING"])
match behaviour.split():
    case ["exit", status]:
        note("end")
        os._exit(int(status))
    case ["crashes", long]:  # at once, but in one of its lives after more than five seconds
        with open(f"{name}.notes") as file:
            time.sleep(5.2 if file.read().count("start ") == int(long) else 0)
        note("end")
        os._exit(1)
    case ["kill"]:
        note("end")
        os.kill(os.getpid(), signal.SIGKILL)
    case ["leave", status]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child(ends=False)
        while True:
            with open(f"{name}.notes") as file:
                if "child " in file.read():
                    break
            time.sleep(0.01)
        os._exit(int(status))
    case ["stay"]:
        listen()
        note("ready")
        sleep()
    case ["slow"]:
        listen(takes_s=1.5)
        note("ready")
        sleep()
    case ["deaf"]:
        listen(ends=False)
        note("ready")
        sleep()
    case ["family"]:
        listen()
        child()
        note("ready")
        sleep()
    case ["deaf", "family"]:
        listen()
        child(ends=False)
        note("ready")
        sleep()
