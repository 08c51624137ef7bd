"""Conformance suite of trainers: is the gradient of every token the one that the formula gives?

    for result in conformance(MyTrainer):
        print(result.outcome, result.check.name, result.reason)

``MyTrainer(model_folder)`` is your engine or trainer behind two methods (``TrainerUnderTest``), which take one step on
a fixed batch and return d(loss)/d(logprob) of each token. The batch holds every role and every hostile shape: a row
without observations, one without actions, a truncated one, a failed one, equal rewards, two branches, tokens that are
clipped. What is expected is computed in Python floats from the formulas alone.

The model is a table in a folder of transformers, so a trainer of such folders reads the gradients off with
``token_gradients``. One that has a loss function over log-probabilities can return the derivative of that.

docs/engines.md has the list of checks, and an example.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from backtalk.engines.conformance.base import (
    Failure,
    NotApplicable,
    Outcome,
    Step,
    StepResult,
    TrainerUnderTest,
)
from backtalk.engines.conformance.checks import CHECKS
from backtalk.engines.conformance.suite import Check, CheckResult, Suite
from backtalk.engines.conformance.table import token_gradients, write_table_model
from backtalk.errors import ConfigError

__all__ = [
    "CHECKS",
    "Check",
    "CheckResult",
    "Outcome",
    "Step",
    "StepResult",
    "TrainerUnderTest",
    "conformance",
    "token_gradients",
    "write_table_model",
]


def conformance(
    open_trainer: Callable[[Path], TrainerUnderTest], *, only: Collection[str] | None = None
) -> Iterator[CheckResult]:
    """Run every check, or those named in ``only``, on the trainer that ``open_trainer`` returns for the table's folder.

    Yields each result as soon as it is known. A refusal (ConfigError) is CANNOT, any other exception of the trainer
    FAILED; nothing is raised for what a trainer does.

    Raises:
        ConfigError: a name in ``only`` is not a check's.
    """
    if unknown := set(only or ()) - {check.name for check in CHECKS}:
        raise ConfigError(
            f"no such checks: {', '.join(sorted(unknown))}; their names are in backtalk.engines.conformance.CHECKS"
        )
    with tempfile.TemporaryDirectory(prefix="backtalk-table-") as folder:
        suite = Suite(open_trainer(write_table_model(Path(folder) / "model")))
        for check in CHECKS:
            if only is None or check.name in only:
                yield CheckResult(check, *_run(check, suite))


def _run(check: Check, suite: Suite) -> tuple[Outcome, str]:
    try:
        return Outcome.PASSED, check.run(suite)
    except NotApplicable as reason:
        return Outcome.NOT_APPLICABLE, str(reason)
    except Failure as failure:
        return Outcome.FAILED, str(failure)
    except ConfigError as refusal:
        return Outcome.CANNOT, str(refusal)
    except Exception as error:  # a stranger's trainer may raise anything
        return Outcome.FAILED, f"{type(error).__name__}: {error}"
