"""Stock of a workshop over HTTP; README.md says what is asked and answered."""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATE = os.environ.get("STATE", os.path.join(os.path.dirname(os.path.abspath(__file__)), "stock.json"))
PORT = int(os.environ.get("PORT", "8070"))


def load():
    with open(STATE) as file:
        return json.load(file)


def save(state):
    with open(STATE, "w") as file:
        json.dump(state, file, indent=1)


def reserve(request):
    state = load()
    stock, orders = state["stock"], state["orders"]
    order, items = request["order"], request["items"]
    unknown = [item for item in items if item not in stock]
    if unknown:
        return 404, {"unknown": unknown}
    for item, count in items.items():
        if stock[item] < count:
            save(state)
            return 409, {"missing": [item]}
        stock[item] -= count
    orders[order] = items
    save(state)
    return 200, {"order": order, "status": "reserved"}


def cancel(request):
    state = load()
    items = state["orders"].pop(request["order"], None)
    if items is None:
        return 404, {"error": "no such order"}
    for item, count in items.items():
        state["stock"][item] += count
    save(state)
    return 200, {"order": request["order"], "status": "cancelled"}


class Handler(BaseHTTPRequestHandler):
    wbufsize = -1  # an answer goes out in one piece

    def do_GET(self):
        stock = load()["stock"]
        item = self.path.removeprefix("/stock/")
        if self.path == "/stock":
            self.answer(200, stock)
        elif item in stock:
            self.answer(200, {"item": item, "count": stock[item]})
        else:
            self.answer(404, {"error": "no such thing"})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/reserve":
            self.answer(*reserve(request))
        elif self.path == "/cancel":
            self.answer(*cancel(request))
        else:
            self.answer(404, {"error": "no such thing"})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
