"""A model's tokenizer: folders in which it is missing, empty or larger than the embedding are refused at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config
from typer.testing import CliRunner

from backtalk.cli import app
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.errors import ConfigError
from backtalk.language.renderer import Renderer
from backtalk.language.tokenizer import load_tokenizer, longest_history
from backtalk.run.config import config_from_dict
from backtalk.run.history import fit_history
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


def test_far_fewer_tokens_than_embedding_rows_are_told_with_both_numbers(tmp_path: Path) -> None:
    """Half of what such a policy samples is no text. A tenth more rows, or up to a multiple of 256, is padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(config_only(tmp_path, rows=1024))
    with pytest.raises(ConfigError, match=r"up to 487 and the model's embedding has 1024 rows, so much of .* no text"):
        load_tokenizer(tmp_path)
    config_only(tmp_path, rows=537)
    with pytest.raises(ConfigError, match=r"embedding has 537 rows.*resize_token_embeddings\(488\)"):
        load_tokenizer(tmp_path)
    config_only(tmp_path, rows=536)
    assert len(load_tokenizer(tmp_path)) == 488


def test_every_stop_token_that_the_model_states_ends_a_reply(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>", "<|observation|>"]})
    names = ("<|im_end|>", "<|eom_id|>", "<|observation|>")
    ids: dict[str, int] = {name: tokenizer.get_vocab()[name] for name in names}
    config = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=ids["<|eom_id|>"])
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = tokenizer.encode("a", add_special_tokens=False)[0]  # one that is text never ends a reply
    GenerationConfig(eos_token_id=[ids["<|im_end|>"], ids["<|observation|>"], plain, 99_999]).save_pretrained(tmp_path)
    renderer = Renderer(load_tokenizer(tmp_path), ())
    assert renderer.stop_token_ids >= {ids["<|im_end|>"], ids["<|eom_id|>"], ids["<|observation|>"]}
    assert not renderer.stop_token_ids & {plain, 99_999}
    (tmp_path / "generation_config.json").write_text("{}")
    assert ids["<|observation|>"] not in Renderer(load_tokenizer(tmp_path), ()).stop_token_ids


def test_a_history_is_no_longer_than_the_models_positions(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    config = Qwen3Config(vocab_size=488, max_position_embeddings=512)
    config.save_pretrained(tmp_path)
    assert longest_history(tmp_path) == 512
    config.rope_parameters = {
        **{"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
        "original_max_position_embeddings": 512,
    }
    config.save_pretrained(tmp_path)
    assert longest_history(tmp_path) == 2048
    Qwen3Config(vocab_size=488, max_position_embeddings=512).save_pretrained(tmp_path)
    said: list[str] = []

    def fitted(**rollout: int) -> int:
        config = config_from_dict({"engine": {"model": str(tmp_path)}, "rollout": rollout})
        return fit_history(config, said.append).rollout.max_tokens

    assert (fitted(max_tokens=512), fitted(max_tokens=100), said) == (512, 100, [])
    assert fitted() == 512 and said == [
        f"model {tmp_path} has positions for 512 tokens: histories end there, not at 16384"
    ]
    with pytest.raises(ConfigError, match=r"rollout.max_tokens=513, and model .* has positions for 512 tokens.*=512"):
        fitted(max_tokens=513)


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
