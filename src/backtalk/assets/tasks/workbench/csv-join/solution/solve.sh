#!/bin/bash
set -e
cd /home/agent/shop
python3 - <<'PY'
import csv
from collections import defaultdict
from decimal import Decimal

def rows(name):
    with open(name, newline="") as file:
        return [{key: value.strip() for key, value in row.items()} for row in csv.DictReader(file)]

def year(date):
    return date[:4] if date[4] == "-" else date[-4:]

region = {row["customer_id"].lstrip("0"): row["region"].lower() for row in rows("customers.csv")}
refund = defaultdict(Decimal)
for row in rows("refunds.csv"):
    refund[row["order_id"]] += Decimal(row["amount"].replace(",", ""))
seen, total, who = set(), defaultdict(Decimal), defaultdict(set)
for row in rows("orders.csv"):
    if row["order_id"] in seen:
        continue
    seen.add(row["order_id"])
    if row["status"].lower() != "paid" or year(row["date"]) != "2030":
        continue
    customer = row["customer_id"].lstrip("0")
    place = region.get(customer, "unknown")
    total[place] += Decimal(row["amount"].replace(",", "")) - refund[row["order_id"]]
    who[place].add(customer)
with open("revenue.csv", "w", newline="") as file:
    out = csv.writer(file)
    out.writerow(["region", "customers", "revenue"])
    out.writerows([r, len(who[r]), f"{total[r]:.2f}"] for r in sorted(total, key=lambda r: -total[r]))
PY
