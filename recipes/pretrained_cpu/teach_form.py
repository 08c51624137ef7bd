"""Teach a pretrained model the form of the depots: how to look, to read a code and to submit it, and no map.

    python recipes/pretrained_cpu/teach_form.py --model minimind --out minimind_depots      # some 15 minutes of a core

The sessions are those of recipes/prediction_pays/teach.py, a script in depots whose map is drawn anew for every task.
The tokenizer gets the four tags of a call that the embedded base model has, and its chat template, so that a prompt is
short: on a CPU the length of a rollout is what a step costs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import sys
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from backtalk.language.renderer import Renderer
from backtalk.language.tokenizer import model_location

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("base_model", "prediction_pays")]
from build import batches
from depots import DEPOTS, Depots, DepotWorld
from teach import FIRST, example, play

TAGS = ["<bash>", "</bash>", "<submit>", "</submit>"]
TOKENS = 3000  # of a batch

log = logging.getLogger("teach")


def add_tags(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the tags as tokens of their own, which begin as the mean of the tokens that their text has had.

    transformers begins all new tokens as nearly the same vector: taught so, the model closed `<bash>` with `</submit>`
    in half of its calls.
    """
    pieces = [tokenizer(tag, add_special_tokens=False).input_ids for tag in TAGS]
    tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = model.get_input_embeddings().weight.data
    for token, piece in zip(tokenizer.convert_tokens_to_ids(TAGS), pieces, strict=True):
        embeddings[token] = embeddings[piece].mean(0)


def sessions(tokenizer: PreTrainedTokenizerBase, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the token ids and weights of that many sessions, each [T]."""
    world = DepotWorld(depth=1, redrawn=True)
    renderer = Renderer(tokenizer, Depots(world.task(DEPOTS[0], FIRST)).tools)
    pairs = []
    for i in range(number):
        draw = Random(f"teach/1/{i}")
        pairs.append(example(*asyncio.run(play(world.task(draw.choice(DEPOTS[:12]), FIRST + i), 1, draw)), renderer))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name of the Hugging Face Hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(model_location("base")).chat_template
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    add_tags(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=arguments.steps, pct_start=0.1)
    data = batches(sessions(tokenizer, 3000), TOKENS, Random(0))
    for step, (ids, weights) in enumerate(itertools.islice(data, arguments.steps)):
        logits = model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            log.info("step %d  loss %.3f", step, loss.item())
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
