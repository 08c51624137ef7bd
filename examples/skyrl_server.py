"""Serve a model over the Tinker API on this machine's CPU, with SkyRL's server and its JAX backend: to try things out.

scripts/skyrl                                                          # .venv-skyrl: SkyRL's server, Python 3.12
.venv-skyrl/bin/python examples/skyrl_server.py MODEL_FOLDER served
backtalk train --preset triage --set engine.kind=tinker --set engine.model=MODEL_FOLDER \
    --set engine.base_url=http://127.0.0.1:8000 --set engine.lora_rank=8 --out runs/tinker

The server's own command starts its engine with `uv run` in a checkout of SkyRL; here both are this Python's.
"""

import argparse
import sys
from pathlib import Path

import uvicorn
from skyrl.tinker import api
from skyrl.tinker.config import EngineConfig, config_to_argv


def main() -> None:
    """Serve until interrupted; checkpoints and the list of requests are kept in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or a name on the Hugging Face hub")
    parser.add_argument("folder", type=Path, help="folder for checkpoints, made if absent")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rank", type=int, default=32, help="largest rank of adapters")
    parser.add_argument("--models", type=int, default=16, help="most models at once")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    api._build_uv_run_cmd_engine = lambda parent, config: [
        *(sys.executable, "-m", "skyrl.tinker.engine"),
        *config_to_argv(config),
    ]
    api.app.state.engine_config = EngineConfig(
        base_model=options.model,
        backend="jax",
        # One row a micro-batch, so that one shape is compiled for any number of rows.
        backend_config={
            "max_lora_adapters": options.models,
            "max_lora_rank": options.rank,
            "train_micro_batch_size": 1,
            "sample_max_num_sequences": 16,
            "loss_chunk_size": 0,
        },
        checkpoints_base=folder / "checkpoints",
        database_url=f"sqlite:///{folder}/tinker.db",
        session_timeout_sec=-1,
    )
    uvicorn.run(api.app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
