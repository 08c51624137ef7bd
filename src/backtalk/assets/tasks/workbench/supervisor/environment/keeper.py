"""Keeps programs running; README.md says how."""

import json
import signal
import subprocess
import sys
import time

DELAYS_S = (0.2, 0.4, 0.8, 1.6)


class Program:
    def __init__(self, name, command, stop_s):
        self.name, self.command, self.stop_s = name, command, stop_s
        self.process = None
        self.ends = 0

    def start(self):
        self.process = subprocess.Popen(self.command)
        print(f"started {self.name} {self.process.pid}")

    def look(self):
        """Start it again if it has ended."""
        status = self.process.poll()
        if status is None:
            return
        print(f"ended {self.name} {status}")
        if status > 0:
            time.sleep(DELAYS_S[min(self.ends, len(DELAYS_S) - 1)])
            self.ends += 1
            self.start()


def main(path):
    with open(path) as file:
        programs = [Program(**entry) for entry in json.load(file)]

    def stop(number, frame):
        print("stopping")
        for program in programs:
            program.process.terminate()
        sys.exit(0)

    def reload(number, frame):
        for program in programs:
            program.process.send_signal(signal.SIGHUP)
            program.start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, reload)
    for program in programs:
        program.start()
    while True:
        for program in programs:
            program.look()
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
