#!/bin/bash
set -e
cd /home/agent/share
cat > bin/new-project <<'SH'
#!/bin/bash
# new-project NAME: makes projects/NAME in the folder of the share, with an inbox and a private folder.
set -e
umask 027
share="$(dirname "$(dirname "$(readlink -f "$0")")")"
project="$share/projects/$1"
mkdir -p "$project/inbox" "$project/private" "$project/public"
echo "project $1" > "$project/README.txt"
echo "nothing yet" > "$project/public/index.html"
echo "keys of $1" > "$project/private/keys.txt"
printf '#!/bin/sh\necho %s\n' "$1" > "$project/run.sh"
chmod 2750 "$project"
chmod 3770 "$project/inbox"
chmod 2700 "$project/private"
chmod 2755 "$project/public"
chmod 640 "$project/README.txt"
chmod 644 "$project/public/index.html"
chmod 600 "$project/private/keys.txt"
chmod 750 "$project/run.sh"
SH
cat > /tmp/conform.py <<'PY'
import os
import stat

SHARE = os.getcwd()
keep = set(open("KEEP").read().splitlines())
entries, names = [], {}
os.chmod(".", os.stat(".").st_mode | 0o700)
for folder, folders, files in os.walk("."):
    for name in folders + files:
        path = os.path.normpath(f"{folder}/{name}")
        state = os.lstat(path)
        entries.append((path, state.st_mode))
        names.setdefault(state.st_ino, []).append(path)
        if stat.S_ISDIR(state.st_mode):
            os.chmod(path, state.st_mode | 0o700)
entries.append((".", os.stat(".").st_mode))
for path, mode in entries:
    if path in keep:
        if stat.S_ISDIR(mode):
            os.chmod(path, stat.S_IMODE(mode))
        continue
    if stat.S_ISLNK(mode):
        folder = os.path.join(SHARE, os.path.dirname(path))
        place = os.path.normpath(os.path.join(folder, os.readlink(path)))
        inside = place == SHARE or place.startswith(SHARE + "/")
        right = os.path.relpath(place, folder)
        if not inside or not os.path.lexists(place):
            os.remove(path)
        elif os.readlink(path) != right:
            os.remove(path)
            os.symlink(right, path)
        continue
    is_folder = stat.S_ISDIR(mode)
    every = names.get(os.lstat(path).st_ino, [path])
    above = [part for name in every for part in (name if is_folder else os.path.dirname(name)).split("/")]
    group, others = mode >> 3 & 7, 0
    group = group | (7 if is_folder else 6) if "inbox" in above else group & ~2
    if "public" in above:
        others = 5 if is_folder else 4
    if "private" in above:
        group = others = 0
    if is_folder:
        special = 0o3000 if os.path.basename(path) == "inbox" else 0o2000
        right = special | 0o700 | group << 3 | others
    else:
        os.chmod(path, 0o600)
        with open(path, "rb") as file:
            program = file.read(2) == b"#!"
        right = 0
        for bits in (6, group, others):
            right = right << 3 | bits & 6 | (bits >> 2 if program else 0)
    os.chmod(path, right)
PY
python3 /tmp/conform.py
