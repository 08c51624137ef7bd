"""Hand a folder of weights to a server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2

from backtalk.engines.server.config import ServerConfig
from backtalk.errors import SamplerFault
from backtalk.rollout.completions import SHOWN, Server

HEAD = "lm_head.weight"


async def load_weights(config: ServerConfig, server: Server, client: httpx2.AsyncClient, folder: Path) -> None:
    """Make a server load the weights in a folder (safetensors, as transformers writes them), and forget its caches.

    Raises:
        SamplerFault: it did not.
        SamplerError: it did not answer.
    """
    match config.kind:
        case "vllm":
            write_tied_head(folder)
            # docs.vllm.ai, RLHF: collective_rpc runs a method in every worker
            call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            status, answer = await server.ask(client, "/collective_rpc", call)
            hint = "start it with VLLM_SERVER_DEV_MODE=1" if status == 404 else f"can it read {folder}?"
            _check(server, status == 200, "/collective_rpc", status, answer, hint)
            status, answer = await server.ask(client, "/reset_prefix_cache", {})
            _check(server, status == 200, "/reset_prefix_cache", status, answer, "is it a vLLM of another version?")
        case "sglang":  # docs.sglang.io, SGLang for RL systems: update weights from disk
            call = {"model_path": str(folder), "flush_cache": True}
            status, answer = await server.ask(client, "/update_weights_from_disk", call)
            done = status == 200 and isinstance(answer, dict) and answer.get("success") is True
            _check(server, done, "/update_weights_from_disk", status, answer, f"can it read {folder}?")
        case "command":
            await _run([*config.update_command, str(folder)])


def write_tied_head(folder: Path) -> None:
    """Write the head of a model whose head is its embeddings, which transformers leaves out.

    vLLM keeps a packed copy for the head on a CPU, and loads that from what bears its name alone.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        return
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found = [name for name in file.keys() if name.endswith("embed_tokens.weight")]  # noqa: SIM118
            if found and HEAD not in file.keys():  # noqa: SIM118
                save_file({HEAD: file.get_tensor(found[0])}, folder / "head.safetensors")
                break
    if (index := folder / "model.safetensors.index.json").exists():  # then no other file is read
        content = json.loads(index.read_text())
        content["weight_map"].setdefault(HEAD, "head.safetensors")
        index.write_text(json.dumps(content))


def _check(server: Server, done: bool, path: str, status: int, answer: Any, hint: str) -> None:
    if not done:
        raise SamplerFault(
            f"{server.url} did not take the new weights: {path} answered with status {status}, "
            f"{str(answer)[:SHOWN]!r}; {hint}"
        )


async def _run(command: list[str]) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
    except OSError as error:
        raise SamplerFault(
            f"engine.sampler.update_command cannot be run: {error}; name a program and its arguments"
        ) from error
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise SamplerFault(
            f"engine.sampler.update_command ended with status {process.returncode}: "
            f"{output.decode(errors='replace').strip()[-SHOWN:]}; it has to load the folder that is its last argument "
            "into the server, and to end with 0 when that is done"
        )
