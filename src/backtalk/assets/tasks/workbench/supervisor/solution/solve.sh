#!/bin/bash
set -e
cat > /home/agent/keeper/keeper.py <<'PY'
"""Keeps programs running; README.md says how."""

import json
import os
import signal
import subprocess
import sys
import time

DELAYS_S = (0.2, 0.4, 0.8, 1.6)
LONG_S = 5.0


def say(*words):
    print(*words, flush=True)


class Program:
    def __init__(self, name, command, stop_s):
        self.name, self.command, self.stop_s = name, command, stop_s
        self.process = None
        self.ends = 0
        self.next_s = 0.0  # when it is started; None while it runs, and when it is done
        self.began_s = 0.0
        self.killed = False

    def start(self):
        self.began_s, self.next_s = time.monotonic(), None
        try:
            self.process = subprocess.Popen(self.command, start_new_session=True)
        except OSError:
            self.process = None
            self.ended(127)
            return
        say("started", self.name, self.process.pid)

    def ended(self, status):
        now_s = time.monotonic()
        say("ended", self.name, status)
        if now_s - self.began_s >= LONG_S:
            self.ends = 0
        if status != 0:
            self.next_s = now_s + DELAYS_S[min(self.ends, len(DELAYS_S) - 1)]
            self.ends += 1

    def signal(self, number):
        if self.process is not None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                pass

    def has_group(self):
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def look(self):
        if self.process is None and self.next_s is not None and time.monotonic() >= self.next_s:
            self.start()
        elif self.process is not None and self.process.poll() is not None:
            self.signal(signal.SIGKILL)
            status, self.process = self.process.returncode, None
            self.ended(status)

    def look_while_stopping(self, since_s):
        """Whether something of it is left."""
        if self.process is None:
            return False
        if self.process.poll() is not None and not self.has_group():
            say("ended", self.name, self.process.returncode)
            self.process = None
            return False
        if not self.killed and time.monotonic() >= since_s + self.stop_s:
            self.killed = True
            self.signal(signal.SIGKILL)
        return True


def main(path):
    with open(path) as file:
        programs = [Program(**entry) for entry in json.load(file)]
    seen = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: seen.append(number))
    stopping_s = None
    while True:
        while seen:
            number = seen.pop(0)
            if number == signal.SIGHUP:
                for program in programs:
                    program.signal(signal.SIGHUP)
            elif stopping_s is None:
                say("stopping")
                stopping_s = time.monotonic()
                for program in programs:
                    program.signal(signal.SIGTERM)
        if stopping_s is None:
            for program in programs:
                program.look()
            if all(program.process is None and program.next_s is None for program in programs):
                return
        elif not [program for program in programs if program.look_while_stopping(stopping_s)]:
            return
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1])
PY
