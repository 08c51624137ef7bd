#!/bin/bash
set -e
cat > /tmp/repair.py <<'PY'
import re

path = "/home/agent/rota/rota.py"
with open(path) as file:
    text = file.read()
doc = dict(re.findall(r'def (\w+)\(.*?\):\n(    """.*?""")\n', text, flags=re.DOTALL))
body = {
    "parse_shift(text)": r'''
    found = re.fullmatch(r"\s*([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})\s*", text)
    if not found:
        raise ValueError(text)
    hour, minute, last_hour, last_minute = map(int, found.groups())
    midnight = (last_hour, last_minute) == (24, 0)
    if hour > 23 or minute > 59 or last_minute > 59 or (last_hour > 23 and not midnight):
        raise ValueError(text)
    begin, end = hour * 60 + minute, last_hour * 60 + last_minute
    return begin, end if end > begin else end + 1440
''',
    "merge(spans)": '''
    merged = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged
''',
    "covered(spans, begin, end)": '''
    return sum(max(0, min(last, end) - max(first, begin)) for first, last in merge(spans))
''',
    "per_person(lines)": '''
    spans = {}
    for line in lines:
        name, _, shifts = line.partition(":")
        for shift in shifts.split(","):
            if shift.strip():
                spans.setdefault(name.strip(), []).append(parse_shift(shift))
    return {name: sum(end - begin for begin, end in merge(shifts)) for name, shifts in spans.items()}
''',
}
with open(path, "w") as file:
    file.write(text.split("\n")[0] + "\n\nimport re\n")
    for head, code in body.items():
        file.write(f"\n\ndef {head}:\n{doc[head.split('(')[0]]}{code}")
PY
python3 /tmp/repair.py
