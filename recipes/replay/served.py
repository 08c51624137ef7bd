"""The adapters of a model on a server of the Tinker API, as it hands them out in PEFT's format."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

from safetensors.torch import load as load_safetensors
from torch import Tensor

from backtalk.engines.remote.service import ServiceError
from backtalk.engines.tinker.sdk import SdkModel, httpx, tinker


def read_adapters(model: SdkModel, url: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return adapter_config.json and the weights of a model's adapters, which the server keeps under ``name``."""
    path = model._ask("its adapters", lambda: model._client.save_weights_for_sampler(name)).path
    rest = tinker.ServiceClient(base_url=url, api_key="tml-none").create_rest_client()
    archive = rest.get_checkpoint_archive_url(path.removeprefix("tinker://").split("/")[0], name).result().url
    answer = httpx.get(archive, follow_redirects=True, timeout=60)
    if answer.is_error:
        raise ServiceError(f"{url} does not hand out the adapters that it saved: {answer.status_code} {answer.text}")
    found: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as files:
        for member in files:
            file = files.extractfile(member)
            if file is not None:
                found[member.name.rsplit("/", 1)[-1]] = file.read()
    return json.loads(found["adapter_config.json"]), load_safetensors(found["adapter_model.safetensors"])
