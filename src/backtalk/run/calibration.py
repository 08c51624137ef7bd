"""Calibration of a policy's predictions: how often the token that it finds most probable is the one that comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import exp

from backtalk.trajectory import TokenScores

BINS = 10  # of the confidence in the most probable token, equally wide


@dataclass(slots=True)
class Calibration:
    """Sums over tokens by confidence: in each bin their number, the sum of the confidence, and how many were right."""

    bins: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0, 0.0] for _ in range(BINS)])

    def add(self, scores: TokenScores, position: int) -> bool:
        """Add a token of scores that name likelier ones; return whether it was the most probable one."""
        likelier = scores.expected.get(position)
        confidence = min(exp(likelier[0][1] if likelier else scores.logprobs[position]), 1.0)
        row = self.bins[min(int(confidence * BINS), BINS - 1)]
        row[0], row[1], row[2] = row[0] + 1, row[1] + confidence, row[2] + (not likelier)
        return not likelier

    def merge(self, other: Calibration) -> None:
        """Add the sums of another one."""
        self.bins = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self.bins, other.bins, strict=True)]

    def means(self) -> Iterator[tuple[int, float | None, float | None]]:
        """Yield the number of tokens, mean confidence and accuracy of each bin; None where it is empty."""
        for tokens, confidence, correct in self.bins:
            yield int(tokens), confidence / tokens if tokens else None, correct / tokens if tokens else None

    @property
    def error(self) -> float | None:
        """Return the expected calibration error, the mean gap of confidence and accuracy over tokens."""
        total = sum(tokens for tokens, _, _ in self.bins)
        return sum(abs(confidence - correct) for _, confidence, correct in self.bins) / total if total else None
