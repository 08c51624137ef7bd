"""Write task folders as other people write them, sound ones and all kinds that are not, and time their check.

    python benchmarks/task_folders.py FOLDER [--count 50]      # writes them
    backtalk tasks check FOLDER --host-packages                # checks them

Each folder's name begins with what its verdict should be.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

REWARD = "&& echo 1 >/logs/verifier/reward.txt || echo 0 >/logs/verifier/reward.txt\n"
BASE = {
    "task.toml": 'version = "1.0"\n',
    "instruction.md": "Write 42 to /work/answer.txt.\n",
    "environment/Dockerfile": "FROM ubuntu:24.04\nWORKDIR /work\n",
    "tests/test.sh": f'#!/bin/bash\n[ "$(cat /work/answer.txt)" = 42 ] {REWARD}',
    "solution/solve.sh": "echo 42 >/work/answer.txt\n",
}
USER = (
    "FROM ubuntu:22.04\nRUN useradd -m -s /bin/bash user && chown -R user:user /home/user\nWORKDIR /work\nUSER user\n"
)
# By verdict: the files in which a folder differs from BASE; None takes one out.
KINDS: dict[str, list[dict[str, str | None]]] = {
    "sound": [
        {},
        {"solution/solve.sh": None},
        {"environment/Dockerfile": USER},
        {"environment/Dockerfile": "FROM python:3.12\nRUN ln -s /usr/bin/python3 /usr/bin/python\nWORKDIR /work\n"},
        {"environment/Dockerfile": "FROM a\nRUN update-alternatives --set editor /usr/bin/vim\nWORKDIR /work\n"},
        {"environment/Dockerfile": "FROM a\nRUN pip install numpy\nWORKDIR /tmp/x\nRUN touch a\nWORKDIR /work\n"},
        {"environment/Dockerfile": "FROM a\nRUN echo '* * * * * root true' >/etc/cron.d/a\nWORKDIR /work\n"},
        {"environment/Dockerfile": "FROM a\nCOPY --chown=a:a x /work/x\n", "environment/x": "1\n"},
        {
            "instruction.md": "Write 42 to /solution/answer.txt.\n",
            "tests/test.sh": f'[ "$(cat /solution/answer.txt)" = 42 ] {REWARD}',
            "solution/solve.sh": None,
        },
        {
            "tests/test.sh": '[ "$(cat answer.txt)" = 42 ]; r=$((1-$?))\necho "{\\"reward\\": $r, \\"flag\\": false}" '
            ">/logs/verifier/reward.json\n"
        },
        {"environment/Dockerfile": "FROM a\nWORKDIR /usr/src/app\nRUN mkdir -p /work\n"},
    ],
    "refused": [
        {"environment/Dockerfile": "FROM ubuntu:22.04\nUSER postgres\n"},
        {"environment/Dockerfile": "FROM a\nCOPY x /usr/local/bin/x\n", "environment/x": "1\n"},
        {"environment/Dockerfile": "FROM a\nRUN echo 1 >/usr/local/bin/x && chmod +x /usr/local/bin/x\n"},
        {"environment/Dockerfile": "FROM a\nENTRYPOINT nginx\n"},
        {"environment/docker-compose.yaml": "services: {a: {build: .}, db: {image: postgres}}\n"},
        {"task.toml": "[environment]\ngpus = 1\n"},
    ],
    "service": [
        {"tests/test.sh": f"(echo >/dev/tcp/127.0.0.1/8080) 2>/dev/null {REWARD}"},
        {"tests/test_it.py": "import urllib.request\nU = 'http://localhost:8080/'\n"},
    ],
    "needs": [
        {"environment/Dockerfile": "FROM a\nRUN pip3 install not_there\n", "tests/test_it.py": "import not_there\n"},
        {"tests/test_it.py": "import never_heard_of\n"},
        {"task.toml": '[metadata]\nneeds = ["no-such-tool"]\n'},
    ],
    "starts": [{"environment/Dockerfile": "FROM a\nRUN false\n"}],
    "silent": [{"tests/test.sh": "true\n"}],
    "collected": [{"tests/test.sh": f"python3 -c 'import answers' {REWARD}", "instruction.md": "Say answers to 42.\n"}],
    "untouched": [{"tests/test.sh": f"true {REWARD}"}],
    "unsolved": [{"solution/solve.sh": "echo 43 >/work/answer.txt\n"}],
}


def write_folders(place: Path, number: int) -> dict[str, int]:
    """Write ``number`` folders of all kinds in turn; return how many there are of each verdict."""
    kinds = [(verdict, changes) for verdict, changed in KINDS.items() for changes in changed]
    counts = dict.fromkeys(KINDS, 0)
    for at, (verdict, changes) in zip(range(number), (kinds[i % len(kinds)] for i in count()), strict=False):
        counts[verdict] += 1
        for name, text in (BASE | changes).items():
            if text is not None:
                path = place / f"{verdict}-{at}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=50)
    given = parser.parse_args()
    print(write_folders(given.folder, given.count))
