"""Find a pretrained model by its name or folder, and load and check its tokenizer."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from backtalk.errors import ConfigError

EMBEDDED = {"base": "base_model", "shop": "shop_model"}  # models in the package: folder of assets by name
HUB_TIMEOUT_S = 10.0
_SPARE, _PADDED_TO = 0.1, 256  # rows that an embedding may have beyond its tokens: a tenth, or up to a round number


def model_location(model: str) -> str:
    """Return the folder of a model, or its Hugging Face name.

    Raises:
        ConfigError: there is no such folder, no model in it, or no network to look a name up.
    """
    if model in EMBEDDED:
        folder = Path(str(resources.files("backtalk"))) / "assets" / EMBEDDED[model]
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model={model!r} is a model that ships with backtalk, but {folder} does not hold it; "
                "reinstall backtalk, or pass the folder or Hugging Face name of another model"
            )
        return str(folder)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model={model!r} is a folder without a config.json; {_instead(path)}")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigError(f"model={model!r} does not exist; pass an existing folder, a Hugging Face name, or 'base'")
    _check_reach(model)
    return model


def _instead(folder: Path) -> str:
    """Return what to pass in place of a folder that holds no model by itself."""
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter: pass the model it was trained on, or save model.merge_and_unload() and pass that"
    if any(folder.glob("*.gguf")):
        return "it holds a GGUF file, which cannot be trained: pass the model in the format of transformers"
    return "pass one that holds a saved model"


def _check_reach(name: str) -> None:
    """Raise ConfigError if a model is not cached and the hub out of reach; its own client would retry for a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except ValueError:  # not a valid name; the hub's client says why when it loads it
        return
    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies() or hub.hostname is None:
        return
    try:
        socket.create_connection((hub.hostname, hub.port or 443), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"model={name!r} is no folder and not in this machine's cache, and {hub.hostname} cannot be reached "
            f"({error}); pass a folder that holds a model, or 'base' for the embedded one"
        ) from error


def load_tokenizer(location: str | Path) -> Any:
    """Return the fast tokenizer of a model's folder or Hugging Face name.

    The stop tokens that the model's files state beside the tokenizer's own are its ``stated_stop_ids``.

    Raises:
        ConfigError: it is missing or damaged, has only special tokens, more tokens than the embedding has rows or far
            fewer.
    """
    from transformers import AutoTokenizer

    try:
        # False, as None would ask on the terminal.
        tokenizer: Any = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # damaged files may raise anything
        raise ConfigError(
            f"the tokenizer of {str(location)!r} cannot be loaded{_missing(location)}: "
            f"{' '.join(str(error).split())}; save the tokenizer that the model was trained with beside it"
        ) from error
    ids = tokenizer.get_vocab()
    if not ids.keys() - tokenizer.get_added_vocab().keys():  # transformers makes an empty one where files are missing
        raise ConfigError(
            f"the tokenizer of {str(location)!r} knows no text, only {len(ids)} special tokens"
            f"{_missing(location, tokenizer.vocab_files_names.values())}; save the tokenizer that the model was "
            "trained with beside it, or pass another model"
        )
    config, needed = model_config(location), max(ids.values()) + 1
    rows = getattr(config, "vocab_size", None)
    beside = "or save the tokenizer that it was trained with beside it"
    if isinstance(rows, int) and needed > rows:
        raise ConfigError(
            f"the tokenizer of {str(location)!r} has token ids up to {needed - 1} and the model's embedding has {rows} "
            f"rows, so it cannot read all of them; call model.resize_token_embeddings({needed}) and save the model "
            f"again, {beside}"
        )
    if isinstance(rows, int) and rows > max(needed * (1 + _SPARE), math.ceil(needed / _PADDED_TO) * _PADDED_TO):
        raise ConfigError(
            f"the tokenizer of {str(location)!r} has token ids up to {needed - 1} and the model's embedding has {rows} "
            "rows, so much of what it can sample is no text; its tokenizer is another model's: call "
            f"model.resize_token_embeddings({needed}) if you mean it, {beside}"
        )
    tokenizer.stated_stop_ids = _stated_stop_ids(location, config)
    return tokenizer


def longest_history(location: str | Path) -> int | None:
    """Return how many tokens a model has positions for; None where its config does not say.

    Positions that are scaled (YaRN and the like) reach as far as the scaling says.
    """
    config = model_config(location)
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    for name in ("rope_parameters", "rope_scaling"):
        scaling = getattr(config, name, None)
        if isinstance(scaling, dict) and isinstance(scaling.get("factor"), int | float):
            trained = scaling.get("original_max_position_embeddings") or longest
            longest = max(longest, int(trained * scaling["factor"]))
    return longest


def _missing(location: str | Path, names: Iterable[str] = ()) -> str:
    """Return words on which files a folder without a tokenizer.json lacks; an empty text for other folders."""
    folder = Path(location)
    if not folder.is_dir() or (folder / "tokenizer.json").is_file():
        return ""
    lacking = (name for name in {"tokenizer.json", *names} if not (folder / name).is_file())
    return f" (the folder lacks {', '.join(sorted(lacking))})"


def model_config(location: str | Path) -> Any:
    """Return the config of a model, of its text part; None where there is none that can be read."""
    from transformers import AutoConfig

    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(location, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError):  # loading the model reports what is wrong with it
        return None


def _stated_stop_ids(location: str | Path, config: Any) -> frozenset[int]:
    """Return the tokens that end a reply by a model's generation_config.json and config.json."""
    from transformers import GenerationConfig

    stated = [getattr(config, "eos_token_id", None)]
    try:
        if config is not None:
            stated.append(GenerationConfig.from_pretrained(location).eos_token_id)
    except (OSError, ValueError, KeyError):  # most folders have none
        pass
    ids = [token for tokens in stated for token in (tokens if isinstance(tokens, list | tuple) else [tokens])]
    return frozenset(token for token in ids if isinstance(token, int))
