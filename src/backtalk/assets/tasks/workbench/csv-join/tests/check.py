import csv
import hashlib
import json

TABLE = [
    ["south", "15", "92011.81"],
    ["north", "14", "89888.42"],
    ["upper east", "9", "67056.45"],
    ["coast", "11", "63324.46"],
    ["islands", "8", "42631.77"],
    ["unknown", "4", "20695.09"],
]
HEADER = ["region", "customers", "revenue"]
SHOP = "/home/agent/shop"
GIVEN = {
    "customers.csv": "45252a8735ff7aa17aa01ee2ce9dd7728c89263530b6425aee9660b7de1350a1",
    "orders.csv": "3413f4fbda77dd1b46ccbe5fb983326e59703e92d99606dc68b96fe7a6268422",
    "refunds.csv": "5915a3fdf353c6b2c8b22291524176f2c59a61ec41b055bd3ebe8864ea464db7",
}


def digest(name):
    try:
        with open(f"{SHOP}/{name}", "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        return str(error)


try:
    with open(f"{SHOP}/revenue.csv", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
except (OSError, ValueError, csv.Error) as error:
    print("revenue.csv:", error)
    rows = []
unchanged = all(digest(name) == true for name, true in GIVEN.items())
right = sum(row in rows for row in TABLE) / len(TABLE) if len(rows) <= len(TABLE) + 1 else 0.0
reward = 1.0 if rows == [HEADER, *TABLE] else 0.5 * right
print("lines right:", right, "unchanged:", unchanged, "got:", rows[:10])
with open("/logs/verifier/reward.json", "w") as file:
    json.dump({"reward": reward if unchanged else 0.0, "lines": right, "unchanged": float(unchanged)}, file)
