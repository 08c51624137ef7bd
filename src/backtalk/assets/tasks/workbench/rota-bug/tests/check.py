"""Runs rota.py in a process of its own, over cases worked out by hand, and writes the reward after it has ended."""

import hashlib
import json
import os
import signal
import subprocess

BAD = "ValueError"
CASES = {
    "parse_shift": [
        (["08:00-12:30"], [480, 750]),
        (["22:00-06:00"], [1320, 1800]),
        (["08:00-08:00"], [480, 1920]),
        (["18:00-24:00"], [1080, 1440]),
        (["00:00-24:00"], [0, 1440]),
        (["00:00-00:00"], [0, 1440]),
        (["  7:05 - 9:10 "], [425, 550]),
        (["23:59-00:00"], [1439, 1440]),
        (["24:00-06:00"], BAD),
        (["08:60-09:00"], BAD),
        (["08:00-24:01"], BAD),
        (["08:00-25:00"], BAD),
        (["08:00"], BAD),
        (["08:00-09:00-10:00"], BAD),
        (["-1:00-02:00"], BAD),
        (["ab:00-02:00"], BAD),
        ([""], BAD),
    ],
    "merge": [
        ([[[0, 10], [10, 20], [30, 40]]], [[0, 20], [30, 40]]),
        ([[[0, 100], [10, 20]]], [[0, 100]]),
        ([[[50, 60], [0, 10], [5, 51]]], [[0, 60]]),
        ([[[1, 2], [3, 4]]], [[1, 2], [3, 4]]),
        ([[]], []),
        ([[[0, 10], [0, 10], [0, 5], [9, 11]]], [[0, 11]]),
    ],
    "covered": [
        ([[[0, 10], [5, 20]], 0, 100], 20),
        ([[[0, 100]], 10, 30], 20),
        ([[[0, 20], [25, 40]], 10, 30], 15),
        ([[[0, 10]], 10, 20], 0),
        ([[[40, 50], [0, 10], [8, 42]], 5, 45], 40),
        ([[], 0, 10], 0),
    ],
    "per_person": [
        ([["Ann: 08:00-12:00, 11:00-15:00"]], {"Ann": 420}),
        ([["Ann: 08:00-12:00", "Bob: 22:00-06:00", "Ann: 10:00-13:00"]], {"Ann": 300, "Bob": 480}),
        ([["", "Ann:09:00-10:00 ", "   "]], {"Ann": 60}),
        ([["Bob:", "  Eva Lu : 09:00-10:00,10:00-11:00"]], {"Eva Lu": 120}),
        ([["Ann: 08:00-08:00"]], {"Ann": 1440}),
        ([[]], {}),
    ],
}
UNCHANGED = "9dca8d952af7e7ac9c7f1b3c94a465389bf4edb2ccce7f96af7f06440bf2ceaa"
RUNNER = """
import copy, json, sys
sys.path.insert(0, "/home/agent/rota")
import rota
cases = json.load(sys.stdin)
def call(name, given):
    before = copy.deepcopy(given)
    if name in ("merge", "covered"):
        given = [[tuple(span) for span in given[0]], *given[1:]]
        before = copy.deepcopy(given)
    try:
        value = getattr(rota, name)(*given)
    except Exception as error:
        return type(error).__name__
    if given != before:
        return "the argument was changed"
    return value
json.dump({name: [[call(name, given) for _ in range(2)] for given in every] for name, every in cases.items()}, sys.stdout)
"""

path = "/home/agent/rota/rota.py"
try:
    with open(path, "rb") as file:
        changed = hashlib.sha256(file.read()).hexdigest() != UNCHANGED
except OSError:
    changed = False
process = subprocess.Popen(
    ["python3", "-c", RUNNER],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    start_new_session=True,
    cwd="/tmp",
    text=True,
)
try:
    output, _ = process.communicate(json.dumps({n: [given for given, _ in every] for n, every in CASES.items()}), 20)
    results = json.loads(output)
except (subprocess.TimeoutExpired, ValueError) as error:
    print("rota.py cannot be run:", error)
    results = {}
try:
    os.killpg(process.pid, signal.SIGKILL)
except ProcessLookupError:
    pass
parts = {}
for name, every in CASES.items():
    got = results.get(name, [])
    right = [pair == [true, true] for pair, (_, true) in zip(got, every)]
    for pair, (given, true), ok in zip(got, every, right):
        if not ok:
            print(f"{name}{tuple(given)}: {pair}, and it should be {true} both times")
    parts[name] = float(changed and len(right) == len(every) and all(right))
with open("/logs/verifier/reward.json", "w") as file:
    json.dump({"reward": sum(parts.values()) / len(parts), **parts}, file)
