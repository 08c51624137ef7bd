"""What any sandbox must show, tried for real: behaviours, limits, attacks from inside, and what is left at the end.

    for result in await conformance(my_backend):
        print(result.outcome, result.check.name, result.reason)

A backend of your own is held to the same checks as those that come with Backtalk (docs/security.md names the checks
that stand behind each claim). Attacks are bounded, nothing is ever sent to an address outside, and what would hurt
this machine is not tried where the backend itself reports that it isolates nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from backtalk.errors import BacktalkError, ConfigError
from backtalk.sandboxes.base import SandboxBackend
from backtalk.sandboxes.conformance import attacks, behaviours, files, hygiene, limits, network, sessions
from backtalk.sandboxes.conformance.base import (
    LIMITS,
    Box,
    Category,
    Check,
    CheckResult,
    Failure,
    NotApplicable,
    Outcome,
    isolates,
)

__all__ = ["CHECKS", "Category", "Check", "CheckResult", "Outcome", "conformance"]

_AT_ONCE = 4
_CHECK_TIMEOUT_S = 90.0

CHECKS: tuple[Check, ...] = (
    *behaviours.CHECKS,
    *files.CHECKS,
    *limits.CHECKS,
    *attacks.CHECKS,
    *network.CHECKS,
    *sessions.CHECKS,
    *hygiene.CHECKS,
)


async def conformance(backend: SandboxBackend, *, only: Collection[str] | None = None) -> list[CheckResult]:
    """Run every check on `backend`, or those named in `only`, each in a sandbox of its own. In the order of `CHECKS`.

    Takes about half a minute. A check that cannot be tried here (no python3 inside, say) is NOT_APPLICABLE with the
    reason; a sandbox that breaks, hangs or cannot be opened is FAILED, or CANNOT where its own report names the check.
    Nothing is raised for what a backend does.

    Raises:
        ConfigError: a name in `only` that is no check.
    """
    if unknown := set(only or ()) - {check.name for check in CHECKS}:
        raise ConfigError(
            f"no such checks: {', '.join(sorted(unknown))}; their names are in backtalk.sandboxes.conformance.CHECKS"
        )
    chosen = [check for check in CHECKS if only is None or check.name in only]
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(check: Check) -> CheckResult:
        async with slots:
            return await _result(check, backend)

    # What is left behind can only be counted when nothing else comes and goes.
    alone = [check for check in chosen if check.category is Category.HYGIENE]
    together = [check for check in chosen if check.category is not Category.HYGIENE]
    results = list(await asyncio.gather(*map(one, together)))
    return results + [await _result(check, backend) for check in alone]


async def _result(check: Check, backend: SandboxBackend) -> CheckResult:
    if check.harmful_if_open and not isolates(backend.report):
        reason = f"it would hurt this machine: {backend.report.name} reports that it isolates nothing"
        return CheckResult(check, Outcome.NOT_APPLICABLE, reason)
    began = time.perf_counter()
    outcome, reason = await _tried(check, backend)
    if outcome is Outcome.FAILED and check.name in backend.report.cannot:
        outcome, reason = Outcome.CANNOT, f"{backend.report.cannot[check.name]} ({reason})"
    return CheckResult(check, outcome, reason, time.perf_counter() - began)


async def _tried(check: Check, backend: SandboxBackend) -> tuple[Outcome, str]:
    try:
        async with asyncio.timeout(_CHECK_TIMEOUT_S), backend.open(LIMITS) as sandbox:
            await check.run(Box(sandbox, backend))
    except NotApplicable as reason:
        return Outcome.NOT_APPLICABLE, str(reason)
    except Failure as found:
        return Outcome.FAILED, str(found)
    except TimeoutError:
        return Outcome.FAILED, f"no end within {_CHECK_TIMEOUT_S:g} s"
    except (BacktalkError, OSError) as error:
        return Outcome.FAILED, f"{type(error).__name__}: {error}"
    return Outcome.PASSED, ""
