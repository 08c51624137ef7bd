"""SkyRL's Tinker server with its JAX backend on the CPU, over one model folder:

python server.py MODEL_FOLDER WORK_FOLDER PORT

The server starts its engine by `uv run`; here both are this Python's.
"""

import json
import sys
from pathlib import Path

import uvicorn
from skyrl.tinker import api
from skyrl.tinker.config import EngineConfig, config_to_argv

# One row a micro-batch, so that one shape is compiled for any number of rows.
BACKEND = {"max_lora_adapters": 16, "max_lora_rank": 8, "train_micro_batch_size": 1, "sample_max_num_sequences": 4}


def main(model: str, work: str, port: str) -> None:
    api._build_uv_run_cmd_engine = lambda parent, config: [
        sys.executable,
        *("-m", "skyrl.tinker.engine"),
        *config_to_argv(config),
    ]
    api.app.state.engine_config = EngineConfig(
        base_model=model,
        backend="jax",
        backend_config=BACKEND | {"loss_chunk_size": 0},
        checkpoints_base=Path(work) / "checkpoints",
        database_url=f"sqlite:///{work}/tinker.db",
        session_timeout_sec=-1,
    )
    print(json.dumps(BACKEND), flush=True)
    uvicorn.run(api.app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
