#!/bin/bash
set -e
cd /home/agent/fleet
python3 - <<'PY'
import re

keep = {line.split("#")[0].strip() for line in open("keep.txt")}
with open("fleet.conf", "rb") as file:
    blocks = re.split(rb"(?m)^(?=\[)", file.read())
for number, block in enumerate(blocks):
    head = re.match(rb"\[machine ([^\]]+)\][ \t]*(\r?\n)", block)
    if not head or head.group(1).decode() in keep:
        continue
    held = {}
    for line in re.finditer(rb"(?m)^[ \t]*(\w+)[ \t]*=[ \t]*([^\r\n]*?)[ \t]*\r?$", block):
        held[line.group(1).decode()] = line
    if any(key not in held or held[key].group(2).lower() != want for key, want in (("role", b"cache"), ("zone", b"north"))):
        continue
    if "port" in held:
        begin, end = held["port"].span(2)
        blocks[number] = block[:begin] + b"7443" + block[end:]
    else:
        blocks[number] = block[: head.end()] + b"port = 7443" + head.group(2) + block[head.end() :]
with open("fleet.conf", "wb") as file:
    file.write(b"".join(blocks))
PY
