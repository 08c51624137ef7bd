"""OpenEnv's protocol as a bare ASGI app: it starts at once, and can answer what no server should."""

import asyncio
import json
import os
from typing import Any

SCHEMA = {"action": {"type": "object", "properties": {"say": {"type": "string"}}, "required": ["say"]}}
OLD = "PLAIN_OLD" in os.environ  # a server from before the protocol: HTTP alone, no schemas
print("plain server speaking", flush=True)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    match scope["type"]:
        case "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
        case "http":
            found = {"/health": {"status": "healthy"}} | ({} if OLD else {"/schema": SCHEMA})
            status, body = (200, found[scope["path"]]) if scope["path"] in found else (404, {"detail": "Not Found"})
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(body).encode()})
        case "websocket" if not OLD:
            await receive()
            await send({"type": "websocket.accept"})
            await play(receive, send)
        case "websocket":
            await receive()
            await send({"type": "websocket.close"})


async def play(receive: Any, send: Any) -> None:
    async def answer(text: str) -> None:
        await send({"type": "websocket.send", "text": text})

    while (event := await receive())["type"] == "websocket.receive":
        message = json.loads(event["text"])
        words = message.get("data", {}).get("say", "").split()
        match [message["type"], *words]:
            case ["close"]:
                return
            case ["reset"]:
                await answer(observed("ready"))
            case ["step", "die"]:
                print("plain server dying", flush=True)
                os._exit(3)
            case ["step", "hang"]:
                await asyncio.sleep(600)
            case ["step", "leave"]:
                await send({"type": "websocket.close", "code": 1011})
                return
            case ["step", "pay", amount]:  # as JSON: null, NaN and "much" too
                await answer(observed("paid").replace('"reward": null', f'"reward": {amount}'))
            case ["step", "end", amount]:
                await answer(observed("over").replace("null", amount).replace("false", "true"))
            case ["step", "maybe"]:
                await answer(observed("?").replace("false", '"maybe"'))
            case ["step", "variables"]:
                await answer(observed(json.dumps(dict(os.environ))))
            case ["step", "garbage"]:
                await answer('{"type": "observation", "data": {')
            case ["step", "alien"]:
                await answer('{"jsonrpc": "2.0", "result": {"content": []}}')
            case ["step", "bare"]:
                await answer('{"type": "observation", "data": {"text": "no observation"}}')
            case ["step", *said]:
                await answer(observed(" ".join(said)))
            case _:
                await answer('{"type": "error", "data": {"code": "UNKNOWN_TYPE", "message": "Unknown message type"}}')


def observed(text: str) -> str:
    return json.dumps({"type": "observation", "data": {"observation": {"text": text}, "reward": None, "done": False}})
