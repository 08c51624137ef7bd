"""Writes the three CSV files of the shop. The same bytes on every machine."""

import csv
import os
import random

rng = random.Random(4411)
regions = ["North", "south", "Upper East", "coast", "Islands"]
os.makedirs("/home/agent/shop", exist_ok=True)


def number(low, high):
    return low + int(rng.random() * (high - low))


def write(name, header, rows):
    with open(f"/home/agent/shop/{name}", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(header)
        out.writerows(rows)


customers = []
for i in range(1, 61):
    name = [f"Customer {i}", f"Lee, Ann {i}", f'The "Old" Mill {i}', f"Two\nLines {i}"][number(0, 4)]
    region = regions[number(0, 5)]
    customers.append([f"{i:04}" if i % 3 else str(i), name, [region, region.upper(), f" {region} "][number(0, 3)]])
write("customers.csv", ["customer_id", "name", "region"], customers)

orders = []
for i in range(1, 401):
    customer = number(1, 66)  # 61 to 65 are nobody's
    year = 2029 + (number(0, 10) > 0) + (number(0, 12) == 0)
    month, day = number(1, 13), number(1, 29)
    date = f"{year}-{month:02}-{day:02}" if rng.random() < 0.6 else f"{day:02}.{month:02}.{year}"
    status = ["paid", "Paid", " PAID", "open", "cancelled", "unpaid", "paid"][number(0, 7)]
    cents = number(500, 400000)
    amount = f"{cents // 100:,}.{cents % 100:02}"
    ident = f"{customer:04}" if rng.random() < 0.5 else str(customer)
    orders.append([f"A{i:05}", ident, date, status, amount])
for i in range(0, 400, 37):
    again = list(orders[i])
    again[4] = "1.00"
    orders.insert(min(i + 45, len(orders)), again)
write("orders.csv", ["order_id", "customer_id", "date", "status", "amount"], orders)

refunds = []
for _ in range(70):
    cents = number(100, 5000)
    refunds.append([f" A{number(1, 420):05}", f"{cents // 100}.{cents % 100:02}"])
write("refunds.csv", ["order_id", "amount"], refunds)
