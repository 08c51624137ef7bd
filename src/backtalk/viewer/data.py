"""Read rollouts of a run folder for showing: tokens as text that is safe to print, weights, and colours of roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backtalk.errors import DataError
from backtalk.run.log import RunLog
from backtalk.trajectory import TokenRole, TokenWeights, Trajectory, TrajectoryGroup

MAX_TOKENS_A_CHARACTER = 4  # of UTF-8 bytes, each possibly its own token
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}

# By role: terminal style, HTML text colour, HTML background, meaning.
LOOKS = {
    TokenRole.CONTEXT: ("grey62", "#57606a", "#f6f8fa", "given text"),
    TokenRole.TEMPLATE: ("grey37", "#afb8c1", "#ffffff", "chat template"),
    TokenRole.ACTION: ("bold green", "#116329", "#dafbe1", "action of the agent"),
    TokenRole.ENV_OUTPUT: ("cyan", "#0a3069", "#ddf4ff", "environment output"),
    TokenRole.WARNING: ("yellow", "#7d4e00", "#fff8c5", "written by the harness"),
}


@dataclass(frozen=True, slots=True)
class ShownRollout:
    """A trajectory with its tokens as text and the weights it was trained with, None where no step trained on it."""

    trajectory: Trajectory
    texts: Sequence[str]
    weights: TokenWeights | None
    title: str

    @property
    def facts(self) -> list[str]:
        """Return reward, advantage and stop reason in words."""
        reward, weights = self.trajectory.reward, self.weights
        if weights is None:
            advantage = "no weights on record: no step was trained on it"
        elif weights.advantage is None:
            advantage = "no advantage: outside the policy term"
        else:
            advantage = f"advantage {weights.advantage:+.3f}"
        ending = self.trajectory.stop_reason.value
        return ["no reward" if reward is None else f"reward {reward:g}", advantage, ending]

    def weights_at(self, position: int) -> tuple[float, float]:
        """Return a token's weight in the policy term and in the world-model term."""
        weights = self.weights
        return (0.0, 0.0) if weights is None else (weights.policy[position], weights.world[position])


def find_rollout(
    folder: str | Path, *, step: int | None = None, group: int = 0, sample: int = 0, evaluation: bool = False
) -> ShownRollout:
    """Return a rollout of a training step, or of the evaluation before that step; of the last step by default.

    Raises:
        DataError: there is no such step, group or sample.
    """
    log, step = _find_step(folder, step, evaluation)
    groups = find_groups(folder, step=step, evaluation=evaluation)
    _check_index("group", group, len(groups))
    _check_index("sample", sample, len(groups[group]))
    trajectory = groups[group].trajectories[sample]
    weights = None if evaluation else log.read_weights(step, groups)
    kind = "evaluation before step" if evaluation else "training step"
    title = f"{kind} {step} · group {group} of {len(groups)} · sample {sample} of {len(groups[group])}"
    texts = token_texts(load_tokenizer(log.tokenizer_path), trajectory.token_ids)
    return ShownRollout(trajectory, texts, weights[group][sample] if weights else None, title)


def find_groups(folder: str | Path, *, step: int | None = None, evaluation: bool = False) -> list[TrajectoryGroup]:
    """Return the groups of a training step, or of the evaluation before it; of the last step by default.

    Raises:
        DataError: there is no such step.
    """
    log, step = _find_step(folder, step, evaluation)
    return log.read_evaluation_groups(step) if evaluation else log.read_groups(step)


def _find_step(folder: str | Path, step: int | None, evaluation: bool) -> tuple[RunLog, int]:
    log = RunLog(folder)
    log.read_config()  # refuses a folder that holds no run
    steps = log.evaluation_steps() if evaluation else log.group_steps()
    kind = "evaluation" if evaluation else "training step"
    if not steps:
        raise DataError(f"{log.folder} has no finished {kind} yet; wait for the first one")
    if step is not None and step not in steps:
        raise DataError(f"{log.folder} has no {kind} {step}; there are {', '.join(map(str, steps))}")
    return log, steps[-1] if step is None else step


def _check_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise DataError(f"there is no {name} {index}; pass 0 to {count - 1}")


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that a run keeps in its folder (a ``tokenizers.Tokenizer``, which needs no transformers).

    Raises:
        DataError: the folder has no tokenizer.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path} is missing, so token ids cannot be shown as text; copy the model's tokenizer.json there"
        )
    return Tokenizer.from_file(str(path))


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text of each token, control characters made visible; see :func:`raw_token_texts`."""
    return [visible(text) for text in raw_token_texts(tokenizer, token_ids)]


def text_of(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return the text of a run of tokens; their ids where no tokenizer is known."""
    if tokenizer is None:
        return " ".join(f"⟨{token}⟩" for token in token_ids)
    return tokenizer.decode(list(token_ids), skip_special_tokens=False)


def raw_token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text of each token as it is.

    A character spread over several tokens is shown at the first of them, and the others are empty.
    """
    texts: list[str] = []
    while len(texts) < len(token_ids):
        start = len(texts)
        for width in range(1, MAX_TOKENS_A_CHARACTER + 1):
            text = tokenizer.decode(list(token_ids[start : start + width]), skip_special_tokens=False)
            if "\ufffd" not in text:
                break
        else:
            width, text = 1, tokenizer.decode([token_ids[start]], skip_special_tokens=False)
        width = min(width, len(token_ids) - start)
        texts += [text, *[""] * (width - 1)]
    return texts


def visible(text: str) -> str:
    """Return the text with control characters as pictures, so that sandbox output cannot steer a terminal."""
    return text.translate(_PICTURES)
