import http.client
import json
import os
import random
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True
import fence  # noqa: E402
from make_world import FOLDER, days  # noqa: E402

STATE = "/tmp/judge/state.json"
ITEMS = ["anvil", "bell", "cog", "drum"]
rng = random.Random(3)


class Service:
    """server.py on a free port of this machine, until it is killed."""

    def __enter__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        env = {"PATH": os.environ["PATH"], "PORT": str(self.port), "STATE": STATE}
        self.process = fence.start(["python3", f"{FOLDER}/server.py"], cwd=FOLDER, env=env)
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                time.sleep(0.02)
        return self

    def __exit__(self, *_):
        fence.end(self.process)

    def ask(self, path, request=None):
        """(status, answer) of a GET, or of a POST where there is a request: bytes as they are, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            body = request if isinstance(request, bytes) or request is None else json.dumps(request).encode()
            connection.request("GET" if body is None else "POST", path, body)
            response = connection.getresponse()
            answer = json.loads(response.read(1 << 20))
            return response.status, answer if isinstance(answer, dict) else None
        finally:
            connection.close()


class Shop:
    """What the service has to be."""

    def __init__(self, stock):
        self.stock, self.orders = dict(stock), {}

    def answer(self, path, request=None):
        """(status, answer); of an error only the name "error" is told."""
        if request is None:
            item = path.removeprefix("/stock/")
            if path == "/stock":
                return 200, dict(self.stock)
            return (200, {"item": item, "count": self.stock[item]}) if item in self.stock else (404, "error")
        if path not in ("/reserve", "/cancel"):
            return 404, "error"
        order = request.get("order") if isinstance(request, dict) else None
        if not isinstance(order, str) or not order:
            return 400, "error"
        return self.reserve(order, request.get("items")) if path == "/reserve" else self.cancel(order)

    def reserve(self, order, items):
        if not isinstance(items, dict) or not items or any(type(n) is not int or n <= 0 for n in items.values()):
            return 400, "error"
        if unknown := sorted(set(items) - set(self.stock)):
            return 404, {"unknown": unknown}
        if order in self.orders:
            same = self.orders[order] == items
            return (200, {"order": order, "status": "reserved"}) if same else (409, "error")
        if missing := sorted(item for item, count in items.items() if self.stock[item] < count):
            return 409, {"missing": missing}
        for item, count in items.items():
            self.stock[item] -= count
        self.orders[order] = dict(items)
        return 200, {"order": order, "status": "reserved"}

    def cancel(self, order):
        if order not in self.orders:
            return 404, "error"
        for item, count in self.orders.pop(order).items():
            self.stock[item] += count
        return 200, {"order": order, "status": "cancelled"}


def write(shop):
    with open(STATE, "w") as file:
        json.dump({"stock": shop.stock, "orders": shop.orders}, file)


def read(path=STATE):
    with open(path) as file:
        return json.load(file)


def request():
    """A path and what is sent there, mostly sensible."""
    order = f"o{rng.randint(1, 25)}"
    items = {item: rng.randint(1, 6) for item in rng.sample(ITEMS, rng.randint(1, 3))}
    kind = rng.random()
    if kind < 0.5:
        return "/reserve", {"order": order, "items": items}
    if kind < 0.65:
        return "/cancel", {"order": order}
    if kind < 0.75:
        return rng.choice(["/stock", "/stock/cog", "/stock/zebra"]), None
    if kind < 0.85:
        return "/reserve", {"order": order, "items": items | {rng.choice(["zebra", "yak"]): 1, "xylophone": 2}}
    count = rng.choice([0, -3, "2", 1.5, True, None])
    bad = [{"order": order, "items": items | {"bell": count}}, {"order": order, "items": {}}, {"order": order}]
    bad += [
        {"order": "", "items": items},
        {"order": 7, "items": items},
        [1],
        "text",
        {"items": items},
        {"order": order, "items": ["cog"]},
    ]
    return rng.choice(["/reserve", "/reserve", "/cancel", "/elsewhere"]), rng.choice(bad)


def agrees(service, shop, path, sent):
    status, right = shop.answer(path, sent)
    given, answer = service.ask(path, sent)
    ok = given == status and answer is not None
    ok = ok and (set(answer) == {"error"} and isinstance(answer["error"], str) if right == "error" else answer == right)
    if not ok:
        print(path, json.dumps(sent), "was answered by", given, answer, "and it should be", status, right)
    return ok


def one_by_one():
    """Requests one after the other, with the server killed now and then; the file is right all the time."""
    shop = Shop({"anvil": 9, "bell": 25, "cog": 40, "drum": 0})
    write(shop)
    begin = "/tmp/judge/begin.json"
    os.link(
        STATE, begin
    )  # a second name: it keeps the old state when the file is replaced, not when it is written over
    for _ in range(2):
        with Service() as service:
            for number in range(70):
                if not agrees(service, shop, *request()) or read() != {"stock": shop.stock, "orders": shop.orders}:
                    print("state:", read(), "and it should be", shop.stock, shop.orders)
                    return False
                if number % 20 == 7 and not agrees(service, shop, "/stock", None):
                    return False
            for rubbish in (b"", b"{", b"\xff\xfe", b"nonsense"):
                status, answer = service.ask("/reserve", rubbish)
                if status != 400 or set(answer or ()) != {"error"}:
                    print(rubbish, "was answered by", status, answer)
                    return False
    replaced = read(begin)["orders"] == {}
    print("the state file is replaced in one step:", replaced)
    return replaced


def at_once():
    """Many clients want the same few pieces; whatever happens, none is sold twice, and none gets lost."""
    write(Shop({"anvil": 12, "bell": 12, "cog": 500}))
    with Service() as service, ThreadPoolExecutor(8) as clients:
        sent = [{"order": f"{n}", "items": {"anvil" if n % 2 else "bell": 1, "cog": 2}} for n in range(64)]
        answers = list(clients.map(lambda order: service.ask("/reserve", order)[0], sent))
    done = {order["order"]: order["items"] for order, status in zip(sent, answers) if status == 200}
    right = {"stock": {"anvil": 0, "bell": 0, "cog": 500 - 2 * len(done)}, "orders": done}
    if len(done) != 24 or answers.count(409) != 40 or read() != right:
        print("at once:", answers, read())
    return len(done) == 24 and answers.count(409) == 40 and read() == right


def holds(part):
    try:
        return part()
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        print(f"{part.__name__}: {error!r}")
        return False


def stock_is_right():
    copy, lines, state = days()
    with open(f"{FOLDER}/journal.log") as file:
        kept = file.read() == "".join(f"{line}\n" for line in lines)
    return kept and read(f"{FOLDER}/stock-2023-05-01.json") == copy and read(f"{FOLDER}/stock.json") == state


os.makedirs("/tmp/judge")
fence.score(**{part.__name__: holds(part) for part in (stock_is_right, one_by_one, at_once)})
