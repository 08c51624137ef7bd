"""Describe one rollout as plain data: a conversation by who made each piece, then every token with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backtalk.errors import DataError
from backtalk.run.log import read_trajectory, trajectory_to_dict
from backtalk.run.log.scores import read_scores_row
from backtalk.run.log.weights import read_weights_row
from backtalk.trajectory import Segment, TokenRole, TokenScores, TokenWeights
from backtalk.viewer.data import raw_token_texts, text_of
from backtalk.viewer.live.audit import count_roles, facts_of_failure, find_faults
from backtalk.viewer.live.calls import read_action
from backtalk.viewer.live.sources import Part, Source
from backtalk.viewer.live.surprises import find_surprises


class Opened:
    """One rollout of a source: its trajectory, the weights it was trained with, and the text of its tokens."""

    def __init__(self, source: Source, part: Part, row: int) -> None:
        self.source, self.part, self.row = source, part, row
        self.trajectory = read_trajectory(part.path, row)
        has_weights = part.weights is not None and part.weights.is_file()
        self.weights: TokenWeights | None = (
            read_weights_row(part.weights, row, len(self.trajectory)) if has_weights and part.weights else None
        )

        has_scores = part.scores is not None and part.scores.is_file()
        self.scores: dict[str, TokenScores] = (
            read_scores_row(part.scores, row, len(self.trajectory)) if has_scores and part.scores else {}
        )

    @classmethod
    def find(cls, source: Source, part: str, row: int) -> Opened:
        """Open a rollout by the key of its file and its row.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        parts = {each.key: each for each in source.parts()}
        if part not in parts:
            raise DataError(f"{source.name} has no trajectories {part!r} (any more); there are {', '.join(parts)}")
        if row < 0:
            raise DataError(f"row {row} is none; rows count from 0")
        return cls(source, parts[part], row)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a run of tokens; their ids where no tokenizer is known."""
        return text_of(self.source.tokenizer, token_ids)

    def token_texts(self) -> list[str]:
        """Return the text of each token."""
        if self.source.tokenizer is None:
            return [f"⟨{token}⟩ " for token in self.trajectory.token_ids]
        return raw_token_texts(self.source.tokenizer, self.trajectory.token_ids)

    def conversation(self) -> dict[str, Any]:
        """Return facts, segments with their text and sums of weights, and the audit."""
        trajectory, weights = self.trajectory, self.weights
        texts = self.token_texts() if self.part.kind != "file" and self.source.tokenizer is not None else None
        return {
            "run": self.source.name,
            "part": self.part.key,
            "row": self.row,
            "kind": self.part.kind,
            "step": self.part.step,
            "task": trajectory.task_id,
            "sample": trajectory.sample_index,
            "version": trajectory.policy_version,
            "reward": trajectory.reward,
            "advantage": weights and weights.advantage,
            "trained": weights is not None,
            "stop": trajectory.stop_reason.value,
            "failure": facts_of_failure(trajectory),
            "turns": trajectory.num_turns,
            "tokens": len(trajectory),
            "branches": len(trajectory.branches),
            "stats": dict(trajectory.stats),
            "tokens_of": self.source.tokens_of,
            "has_text": self.source.tokenizer is not None,
            "segments": self._segments(),
            "roles": count_roles(trajectory, weights),
            "findings": find_faults(trajectory, weights, texts),
            "surprises": find_surprises(trajectory, self.scores, self.text_of),
            "compared": texts is not None and bool(trajectory.messages) and len(trajectory.branches) == 1,
        }

    def tokens(self) -> dict[str, Any]:
        """Return columns over all tokens: ids, texts, sampling logprobs, weights in both terms, and scores."""
        weights = self.weights
        return {
            "ids": list(self.trajectory.token_ids),
            "texts": self.token_texts(),
            "logprobs": list(self.trajectory.logprobs),
            "policy": None if weights is None else list(weights.policy),
            "world": None if weights is None else list(weights.world),
            "scores": {name: self._scored(scores) for name, scores in self.scores.items()},
        }

    def _scored(self, scores: TokenScores) -> dict[str, Any]:
        """Return a checkpoint's log-probabilities, and the text and log-probability of what it expected instead."""
        known = {token for tokens in scores.expected.values() for token, _ in tokens}
        texts = {token: self.text_of([token]) for token in known}
        expected = {
            position: [[texts[token], round(logprob, 4)] for token, logprob in tokens]
            for position, tokens in scores.expected.items()
        }
        return {"logprobs": [round(x, 4) for x in scores.logprobs], "expected": expected}

    def record(self) -> dict[str, Any]:
        """Return the trajectory as files keep it, with its weights."""
        weights = self.weights
        trained = weights and {"advantage": weights.advantage, "policy": weights.policy, "world": weights.world}
        scores = {name: scores.logprobs for name, scores in self.scores.items()}
        return {**trajectory_to_dict(self.trajectory), "weights": trained, "scores": scores}

    def _segments(self) -> list[dict[str, Any]]:
        tools = [*dict.fromkeys(segment.tool for segment in self.trajectory.segments if segment.tool)]
        rows = []
        for start, end, segment in self.trajectory.spans():
            row: dict[str, Any] = {
                "role": segment.role.name,
                "turn": segment.turn,
                "tool": segment.tool,
                "branch": segment.branch,
                "start": start,
                "end": end,
                "sampled": segment.is_sampled,
                "text": self.text_of(segment.token_ids),
                **self._sums(start, end),
            }
            if self.scores and end > start:
                row["ce"] = {
                    name: -sum(found.logprobs[start:end]) / (end - start) for name, found in self.scores.items()
                }
            if segment.logprobs:
                row["logprob"] = sum(segment.logprobs) / len(segment.logprobs)
            if segment.role is TokenRole.ACTION:
                row["stop_chars"] = self._stop_chars(segment)
                row["action"] = read_action(
                    row["text"][: len(row["text"]) - row["stop_chars"]], self.source.tool_format, tools
                )
            rows.append(row)
        return rows

    def _sums(self, start: int, end: int) -> dict[str, Any]:
        weights, sums = self.weights, {}
        for term in ("policy", "world") if weights is not None else ():
            found = [weight for weight in getattr(weights, term)[start:end] if weight]
            sums |= {term: sum(found), f"{term}_tokens": len(found)} if found else {}
        return sums

    def _stop_chars(self, segment: Segment) -> int:
        """Return the length of the stop token's text at the end of an action; 0 if it ends without one."""
        tokenizer = self.source.tokenizer
        if tokenizer is None or not segment.token_ids:
            return 0
        added = tokenizer.get_added_tokens_decoder().get(segment.token_ids[-1])
        if added is None or not (added.special or added.content == "</s>"):
            return 0
        closes_call = added.content.startswith("</") and added.content != "</s>"
        return 0 if closes_call else len(added.content)
