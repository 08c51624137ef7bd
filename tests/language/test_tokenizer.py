"""A model's tokenizer: folders in which it is missing, empty or larger than the embedding are refused at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3Config
from typer.testing import CliRunner

from backtalk.cli import app
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.errors import ConfigError
from backtalk.language.renderer import Renderer
from backtalk.language.tokenizer import load_tokenizer
from backtalk.run.config import config_from_dict
from backtalk.run.log import RunLog
from backtalk.run.train import train
from tiny import tiny_model_dir, tiny_tokenizer


def config_only(folder: Path, *, rows: int = 488) -> Path:
    """Write a model folder's config.json, with so many rows of embedding, and no tokenizer."""
    Qwen3Config(vocab_size=rows).save_pretrained(folder)
    return folder


def test_a_folder_without_tokenizer_is_named_with_the_files_it_lacks(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"m' knows no text.*lacks merges\.txt, tokenizer\.json, vocab\.json\)"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama", "gpt_neox"])
def test_every_familys_stand_in_is_refused(kind: str, tmp_path: Path) -> None:
    """Gemma's encodes all text as <unk>, GPT-2's as nothing, and Llama's cannot be made."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"the folder lacks .*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_tokenizer_config_alone_is_no_tokenizer(named: str, tmp_path: Path) -> None:
    config_only(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named, "eos_token": "<|im_end|>"}))
    with pytest.raises(ConfigError, match=r"the folder lacks .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_an_empty_vocabulary_and_a_damaged_file_are_told_in_one_line(tmp_path: Path) -> None:
    config_only(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|im_end|>").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="knows no text, only 1 special tokens; save the tokenizer"):
        load_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_embedding_rows_is_told_with_both_numbers(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 488
    tokenizer.save_pretrained(config_only(tmp_path, rows=487))
    with pytest.raises(ConfigError, match="token ids up to 487 and the model's embedding has 487 rows"):
        load_tokenizer(tmp_path)
    for rows in (488, 512):  # padded embeddings are usual
        config_only(tmp_path, rows=rows)
        assert len(load_tokenizer(tmp_path)) == 488
    tokenizer.add_tokens(["<tool>"] * 1 + [f"<later{i}>" for i in range(30)])  # 519
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"up to 518 .* has 512 rows.*resize_token_embeddings\(519\)"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_model_or_template_is_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)  # as a run keeps it: no config.json
    assert load_tokenizer(tmp_path)("ls -la").input_ids == tokenizer("ls -la").input_ids
    with pytest.warns(UserWarning, match="Backtalk's own is used"):
        assert Renderer.from_pretrained(tmp_path, ()).end_of_turn_id == tokenizer.eos_token_id


async def test_a_run_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "m")
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="knows no text"):
        await train(config_from_dict({"sandbox": "unsafe", "engine": {"model": str(model)}}), tmp_path / "run")
    assert not RunLog(tmp_path / "run").folder.exists()
    with pytest.raises(ConfigError, match="knows no text"):  # evaluate and serve
        TorchEngine(TorchConfig(model=str(model), device="cpu"))


@pytest.mark.parametrize(
    "command",
    [
        ["import", "c.jsonl", "--format", "chat", "--out", "o.jsonl", "--model"],
        ["account", "c.jsonl", "--model"],
        ["export", "c.jsonl", "--format", "rfc010", "--out", "o.jsonl", "--model"],
        ["capture", "awm:shop", "--script", "buy.txt", "--out", "o.jsonl", "--tokenizer"],
        ["serve", "--model"],
    ],
    ids=lambda command: command[0],
)
def test_each_command_refuses_it(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config_only(tmp_path / "m")
    (tmp_path / "buy.txt").write_text("list_products\n")
    says = [{"role": "user", "content": "List the files."}, {"role": "assistant", "content": "ls"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": says}) + "\n")
    result = CliRunner().invoke(app, [*command, "m"])
    assert isinstance(result.exception, ConfigError), result.output
    assert "'m' knows no text" in str(result.exception)
    assert not (tmp_path / "o.jsonl").exists()
