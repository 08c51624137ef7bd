import json


def lines_of(content):
    """Lines with their ends."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]] + [content.split(b"\n")[-1]]


def blocks_of(content):
    blocks = [[]]
    for line in lines_of(content):
        if line.startswith(b"["):
            blocks.append([])
        blocks[-1].append(line)
    return blocks


def setting(line):
    """(key, value) of a line that sets something."""
    text = line.decode().strip()
    if "=" not in text or text[0] in "#;[":
        return None
    key, _, value = text.partition("=")
    return key.strip(), value.strip()


def surgery(block, keep):
    """The block as it has to be."""
    words = block[0].decode().strip().strip("[]").split() if block else []
    if len(words) != 2 or words[0] != "machine" or words[1] in keep:
        return block
    held = {}
    for place, line in enumerate(block):
        if found := setting(line):
            held[found[0]] = (place, found[1])
    if held.get("role", (0, ""))[1].lower() != "cache" or held.get("zone", (0, ""))[1].lower() != "north":
        return block
    if "port" not in held:
        end = b"\r\n" if block[0].endswith(b"\r\n") else b"\n"
        return [block[0], b"port = 7443" + end, *block[1:]]
    place, value = held["port"]
    before, sign, after = block[place].partition(b"=")
    return [*block[:place], before + sign + after.replace(value.encode(), b"7443", 1), *block[place + 1 :]]


with open("/tests/keep.txt") as file:
    keep = {line.partition("#")[0].strip() for line in file} - {""}
with open("/tests/fleet.conf", "rb") as file:
    before = blocks_of(file.read())
right = [surgery(block, keep) for block in before]
try:
    with open("/home/agent/fleet/fleet.conf", "rb") as file:
        given = blocks_of(file.read())
except OSError as error:
    print(error)
    given = []
changed = [number for number, block in enumerate(right) if block != before[number]]
others = [number for number in range(len(right)) if number not in changed]
same_shape = len(given) == len(right)
untouched = same_shape and all(given[number] == right[number] for number in others)
done = sum(given[number] == right[number] for number in changed) / len(changed) if same_shape else 0.0
reward = 1.0 if given == right else 0.5 if untouched and done >= 0.5 else 0.0
print(f"{len(changed)} blocks to change, {done:.2f} of them right, the others as they were: {untouched}")
with open("/logs/verifier/reward.json", "w") as file:
    json.dump({"reward": reward, "changed": done, "untouched": float(untouched)}, file)
