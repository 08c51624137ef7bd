#!/bin/bash
set -e
cd /home/agent/stock
python3 - <<'PY'
import json

with open("stock-2023-05-01.json") as file:
    state = json.load(file)
stock, orders = state["stock"], state["orders"]
for line in open("journal.log"):
    what, name, *rest, result = line.split()
    if result != "ok":
        continue
    if what == "receive":
        stock[name] = stock.get(name, 0) + int(rest[0])
    elif what == "cancel":
        for item, count in orders.pop(name).items():
            stock[item] += count
    else:
        orders[name] = {item: int(count) for item, count in (pair.split("=") for pair in rest)}
        for item, count in orders[name].items():
            stock[item] -= count
with open("stock.json", "w") as file:
    json.dump(state, file, indent=1)

with open("server.py") as file:
    text = file.read()
head, tail = text.split("def save(state):")[0], text[text.index("class Handler"):]
head = head.replace("import os\n", "import os\nimport threading\n").replace("\n\ndef load", "LOCK = threading.Lock()\n\n\ndef load")
middle = '''\
def save(state):
    with open(STATE + ".new", "w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(STATE + ".new", STATE)


def order_of(request):
    order = request.get("order") if isinstance(request, dict) else None
    return order if isinstance(order, str) else None


def reserve(request):
    order = order_of(request)
    items = request.get("items") if order else None
    if not isinstance(items, dict) or not items or any(type(n) is not int or n < 1 for n in items.values()):
        return 400, {"error": "not a reservation"}
    state = load()
    stock, orders = state["stock"], state["orders"]
    if unknown := sorted(item for item in items if item not in stock):
        return 404, {"unknown": unknown}
    if order in orders:
        if orders[order] == items:
            return 200, {"order": order, "status": "reserved"}
        return 409, {"error": "there is such an order, of other items"}
    if missing := sorted(item for item, count in items.items() if stock[item] < count):
        return 409, {"missing": missing}
    for item, count in items.items():
        stock[item] -= count
    orders[order] = items
    save(state)
    return 200, {"order": order, "status": "reserved"}


def cancel(request):
    order = order_of(request)
    if not order:
        return 400, {"error": "not a cancellation"}
    state = load()
    if order not in state["orders"]:
        return 404, {"error": "no such order"}
    for item, count in state["orders"].pop(order).items():
        state["stock"][item] += count
    save(state)
    return 200, {"order": order, "status": "cancelled"}


'''
a, b = tail.index("        request = json.loads"), tail.index("    def answer")
tail = tail[:a] + '''\
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        act = {"/reserve": reserve, "/cancel": cancel}.get(self.path)
        if act is None:
            self.answer(404, {"error": "no such thing"})
            return
        try:
            request = json.loads(body)
        except ValueError:
            self.answer(400, {"error": "not JSON"})
            return
        with LOCK:
            answer = act(request)
        self.answer(*answer)

''' + tail[b:]
with open("server.py", "w") as file:
    file.write(head + middle + tail)
PY
