"""Make the small shopper: a copy of the embedded base model that has watched explorers in the shop.

    python recipes/shop/teach.py          # some minutes on one core

It learns from rollouts of tasks of the train split, on the scripts' tokens alone, four in ten of them wrong on
purpose; and looking around in shops, on every token, so that it knows both halves of a conversation with tools.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from backtalk.envs.awm.env import DONE
from backtalk.envs.awm.world import open_scenarios
from backtalk.language.renderer import Renderer
from backtalk.trajectory import Segment, TokenRole
from explore import FIRST_SEED, Session, explore, texts, train_seeds

sys.path.append(str(Path(__file__).parents[1] / "base_model"))
from build import batches, drill_batches, mixed, train  # the base model's own batches and optimizer

log = logging.getLogger("teach")
ASSETS = Path(__file__).parents[2] / "src/backtalk/assets"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
# The tools are told by name alone: the model has learned what they take, and a prompt with their schemas is long.
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}<tool_call>"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    attempts: int = 2600
    strolls: int = 400
    skill: float = 0.6
    vocab_size: int = 900
    drill_steps: int = 300
    steps: int = 500
    learning_rate: float = 3e-3
    batch_tokens: int = 4_000
    seed: int = 0


def train_tokenizer(sessions: list[Session], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that keeps numbers whole and words apart from blanks.

    A name or an id then has the same tokens wherever it stands. Marks and blanks between words may become one token:
    indented JSON is mostly those.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]+|[A-Za-z_]+|[^A-Za-z0-9_]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for session in sessions for text in texts(session)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def copy_of_base(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the base model with another vocabulary: shared tokens keep their embedding, the others get random ones."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(ASSETS / "base_model", dtype=torch.float32)
    known = AutoTokenizer.from_pretrained(ASSETS / "base_model").get_vocab()
    old = model.get_input_embeddings().weight.detach()
    new = torch.randn(len(tokenizer), old.shape[1]) * old.std()
    for token, number in tokenizer.get_vocab().items():
        if token in known:
            new[number] = old[known[token]]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(new)
    model.tie_weights()
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def example(session: Session, renderer: Renderer) -> tuple[Tensor, Tensor]:
    """Return the token ids [T] of a session, and their weights in the loss [T]."""
    segments = list(renderer.render_prompt(session.prompt))
    for number, (call, messages) in enumerate(session.turns):
        segments.append(Segment(TokenRole.ACTION, renderer.encode_action(call), turn=number))
        if messages:
            segments += renderer.render_observation(messages, turn=number, closed=True)
    ids = torch.tensor([token for segment in segments for token in segment.token_ids])
    weights = [float(segment.role is TokenRole.ACTION or session.ordinary) for segment in segments]
    counts = torch.tensor([len(segment.token_ids) for segment in segments])
    return ids, torch.tensor(weights).repeat_interleave(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "shop_model")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    recipe = Recipe(**arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    began = time.monotonic()
    seeds = list(train_seeds(recipe.attempts + recipe.strolls, FIRST_SEED))
    attempts = asyncio.run(explore(seeds[: recipe.attempts], skill=recipe.skill, ordinary=False))
    strolls = asyncio.run(explore(seeds[recipe.attempts :], skill=recipe.skill, ordinary=True))
    log.info("explored in %.0f s", time.monotonic() - began)

    tokenizer = train_tokenizer(attempts + strolls, recipe.vocab_size)
    tools = (*open_scenarios("shop").program("shop").tools, DONE)
    renderer = Renderer(tokenizer, tools)
    pairs = [example(session, renderer) for session in attempts + strolls]
    model = copy_of_base(tokenizer, recipe.seed)
    log.info("%.2f M tokens, %.2f M parameters", sum(len(ids) for ids, _ in pairs) / 1e6, model.num_parameters() / 1e6)
    drill = drill_batches(len(tokenizer), recipe.batch_tokens, Random(recipe.seed))
    train(model, drill, recipe.drill_steps, recipe.learning_rate, cool=False)
    data = mixed((3, batches(pairs, recipe.batch_tokens, Random(recipe.seed))), (1, drill))
    train(model, data, recipe.steps, recipe.learning_rate, cool=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    log.info("done in %.0f s", time.monotonic() - began)


if __name__ == "__main__":
    main()
