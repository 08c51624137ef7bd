"""What is sent again and for how long, as a policy of the SDK's HTTP pipeline.

The SDK never sends a POST a second time by itself, since one that was lost may have been done: a gradient added or a
step taken twice. Some were certainly not done, or do no harm twice; those are repeated here, with back-off.
"""

from __future__ import annotations

import logging
import math
import time
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

HTTPPolicy: Any = import_module("azure.core.pipeline.policies").HTTPPolicy
exceptions: Any = import_module("azure.core.exceptions")

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
HARMLESS = ("/forward", "/sample")  # change nothing on the service
OF_SESSION = ("/heartbeat", "/complete")  # the next one is soon, or the process is about to end
TRIES_OF_HARMLESS = 5
log = logging.getLogger(__name__)


class Patience(HTTPPolicy):
    """Repeats what was refused, and bounds the wait for each operation by ``timeout_s``.

    Raises:
        TimeoutError: refused, or not answered, for ``timeout_s``.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.timeout_s = timeout_s
        self._asked_since: dict[str, float] = {}  # by the address at which an operation's result is asked for

    def send(self, request: Any) -> Any:
        """Send a request through the rest of the pipeline."""
        start, tries = time.monotonic(), 0
        path = urlsplit(request.http_request.url).path
        is_question = request.http_request.method == "GET" and "/request/" in path
        if is_question:
            start = self._asked_since.setdefault(path, start)
        while True:
            tries += 1
            outcome = self._try(request)
            if is_question:
                self._check_answer(path, start, outcome)
            wait_s = _wait_s(path, outcome, tries, is_question=is_question)
            if wait_s is None:
                if isinstance(outcome, Exception):
                    raise outcome
                if not is_question and outcome.http_response.status_code >= 400 and not _json(outcome):
                    raise exceptions.HttpResponseError(response=outcome.http_response)  # the SDK wants JSON of it
                return outcome
            if time.monotonic() + wait_s > start + self.timeout_s:
                raise TimeoutError(f"{_describe(outcome)} for {self.timeout_s:g} s")
            log.warning("%s %s; sent again in %.0f s", path.rpartition("/")[2], _describe(outcome), wait_s)
            time.sleep(wait_s)

    def _try(self, request: Any) -> Any:
        """Return the response, or the error that took its place."""
        try:
            return self.next.send(request)
        except (exceptions.ServiceRequestError, exceptions.ServiceResponseError) as error:
            return error

    def _check_answer(self, path: str, start: float, outcome: Any) -> None:
        """Forget an operation that ended; raise TimeoutError for one that takes too long."""
        if not isinstance(outcome, Exception) and outcome.http_response.status_code == 200:
            body = _json(outcome)
            if body.get("status") != "pending":
                self._asked_since.pop(path, None)
                return
        if time.monotonic() > start + self.timeout_s:
            self._asked_since.pop(path, None)
            raise TimeoutError(f"no answer for {self.timeout_s:g} s")


def _wait_s(path: str, outcome: Any, tries: int, *, is_question: bool) -> float | None:
    """Return the seconds to wait before a request is sent again; None if it must not be, or if the SDK does it."""
    pause = min(FIRST_WAIT_S * 2.0 ** (tries - 1), LONGEST_WAIT_S)
    can_try = path.endswith(HARMLESS) and tries < TRIES_OF_HARMLESS
    if isinstance(outcome, Exception):
        never_sent = isinstance(outcome, exceptions.ServiceRequestError)
        return pause if can_try or (never_sent and not is_question and not path.endswith(OF_SESSION)) else None
    status, hint_s = outcome.http_response.status_code, _hint_s(outcome)
    if status == 401 and tries == 1:  # the SDK drops its token then, and asks for a new one
        return 0.0
    if is_question or path.endswith(OF_SESSION):
        return None
    if status == 429 or (status == 503 and hint_s is not None):  # refused by the service, as it says itself
        return pause if hint_s is None else hint_s
    return pause if status >= 500 and can_try else None


def _hint_s(response: Any) -> float | None:
    """Return when the service asks to be tried again, in seconds from now."""
    body = _json(response)
    detail = body.get("detail")
    hint = (detail if isinstance(detail, dict) else body).get("retry_after_sec")
    try:
        seconds = float(response.http_response.headers.get("Retry-After") if hint is None else hint)
    except (TypeError, ValueError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def _json(response: Any) -> dict[str, Any]:
    """Return the body of a response; empty where it is no JSON object."""
    try:
        body = response.http_response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _describe(outcome: Any) -> str:
    if isinstance(outcome, Exception):
        return f"found no server or got no answer ({type(outcome).__name__})"
    return f"was refused with {outcome.http_response.status_code}"
