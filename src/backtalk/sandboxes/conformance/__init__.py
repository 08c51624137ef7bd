"""Conformance suite of sandboxes: checks of behaviour and limits, attacks from inside, and what is left at the end.

    for result in await conformance(my_backend):
        print(result.outcome, result.check.name, result.reason)

A backend of your own is held to the same checks as those that come with Backtalk; docs/security.md names the checks
behind each claim. Attacks are bounded, and nothing is ever sent to an address outside. Checks that would hurt this
machine are not tried on a backend that itself reports that it isolates nothing.

Each async function of the modules here without a leading underscore is a check, named by the function; so is each entry
of a table CASES, which runs one function on several things.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from backtalk.errors import BacktalkError, ConfigError
from backtalk.sandboxes.base import SandboxBackend
from backtalk.sandboxes.conformance import attacks, behaviours, files, hygiene, limits, network, sessions
from backtalk.sandboxes.conformance.base import (
    LIMITS,
    Category,
    Check,
    CheckResult,
    Failure,
    NotApplicable,
    Outcome,
    SandboxUnderTest,
    isolates,
)

__all__ = ["CHECKS", "Category", "Check", "CheckResult", "Outcome", "conformance"]

_NUM_CONCURRENT = 4
_CHECK_TIMEOUT_S = 90.0


def _checks_in(module: ModuleType, category: Category) -> Iterator[Check]:
    """Yield the checks of a module: its functions, whose docstring is the claim, and its tables of cases."""
    for name, run in vars(module).items():
        if inspect.iscoroutinefunction(run) and not name.startswith("_"):
            claim = " ".join((run.__doc__ or "").split()).removeprefix("Check that ")
            yield Check(
                name, category, claim[:1].upper() + claim[1:], run, name in getattr(module, "HARMFUL_IF_OPEN", ())
            )
    for run, cases in getattr(module, "CASES", {}).items():
        for name, (claim, *tried) in cases.items():
            yield Check(name, category, claim, partial(_run_case, run, tried), name in module.HARMFUL_IF_OPEN)


async def _run_case(run: Callable[..., Awaitable[None]], tried: Sequence[Any], sandbox: SandboxUnderTest) -> None:
    await run(sandbox, *tried)


CHECKS: tuple[Check, ...] = (
    *_checks_in(behaviours, Category.BEHAVIOUR),
    *_checks_in(files, Category.BEHAVIOUR),
    *_checks_in(limits, Category.LIMIT),
    *_checks_in(attacks, Category.ATTACK),
    *_checks_in(network, Category.ATTACK),
    *_checks_in(sessions, Category.ATTACK),
    *_checks_in(hygiene, Category.HYGIENE),
)


async def conformance(backend: SandboxBackend, *, only: Collection[str] | None = None) -> list[CheckResult]:
    """Run every check on `backend`, or those named in `only`, each in a fresh sandbox, in the order of `CHECKS`.

    Takes about half a minute. A check that cannot be tried here (no python3 inside, say) is NOT_APPLICABLE with the
    reason; a sandbox that breaks, hangs or cannot be opened is FAILED, or CANNOT where its own report names the check.
    Nothing is raised for what a backend does.

    Raises:
        ConfigError: a name in `only` is not a check's.
    """
    if unknown := set(only or ()) - {check.name for check in CHECKS}:
        raise ConfigError(
            f"no such checks: {', '.join(sorted(unknown))}; their names are in backtalk.sandboxes.conformance.CHECKS"
        )
    chosen = [check for check in CHECKS if only is None or check.name in only]
    slots = asyncio.Semaphore(_NUM_CONCURRENT)

    async def run(check: Check) -> CheckResult:
        async with slots:
            return await _result(check, backend)

    # Open files and processes of the trainer can only be counted while no other sandbox comes and goes.
    alone = [check for check in chosen if check.category is Category.HYGIENE]
    results = list(await asyncio.gather(*(run(check) for check in chosen if check not in alone)))
    return results + [await run(check) for check in alone]


async def _result(check: Check, backend: SandboxBackend) -> CheckResult:
    """Run one check and return its result; CANNOT in place of FAILED where the backend's report names it."""
    if check.harmful_if_open and not isolates(backend.report):
        reason = f"it would hurt this machine: {backend.report.name} reports that it isolates nothing"
        return CheckResult(check, Outcome.NOT_APPLICABLE, reason)
    outcome, reason = await _run(check, backend)
    if outcome is Outcome.FAILED and check.name in backend.report.cannot:
        outcome, reason = Outcome.CANNOT, f"{backend.report.cannot[check.name]} ({reason})"
    return CheckResult(check, outcome, reason)


async def _run(check: Check, backend: SandboxBackend) -> tuple[Outcome, str]:
    """Run one check in a fresh sandbox and return the outcome, with the reason unless it passed."""
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S), backend.open(LIMITS) as sandbox:
            await check.run(SandboxUnderTest(sandbox, backend))
    except NotApplicable as reason:
        return Outcome.NOT_APPLICABLE, str(reason)
    except Failure as failure:
        return Outcome.FAILED, str(failure)
    except TimeoutError:
        return Outcome.FAILED, f"no result within {_CHECK_TIMEOUT_S:g} s"
    except (BacktalkError, OSError) as error:
        return Outcome.FAILED, f"{type(error).__name__}: {error}"
    return Outcome.PASSED, ""
