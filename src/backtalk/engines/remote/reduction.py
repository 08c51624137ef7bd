"""How a service reduces the losses of tokens to one: measured by what it does to log-probabilities, and undone.

    sum        sum over rows i and tokens t of w_t l_t                                          hosted Tinker, Foundry
    row_mean   1/N sum_i (sum_t w_t l_t / sum_t w_t), N rows since the last optimizer step      SkyRL's JAX backend

Under the second, a weight of the whole row cancels: twice the coefficient is the same gradient. Nothing in a service's
answers says which it is, so a model of its own is trained a few steps on one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from backtalk.engines.remote.config import Reduction
from backtalk.engines.remote.service import AdamStep, Datum, LossName, RemoteModel
from backtalk.errors import ConfigError

# Factors on the gradient of one row of weight 1, by what is done to it: a quarter of the weight; two copies of it in
# one request; two requests.
_FACTORS: dict[Reduction, tuple[float, float, float]] = {"sum": (0.25, 2.0, 2.0), "row_mean": (1.0, 1.0, 1.0)}
_TOLERANCE = 0.3  # of each factor, relative; a response is linear in the step only up to some percent
_EPS = 1e4  # so far above any gradient that AdamW takes the step lr / eps * gradient
_RESPONSE = 0.02  # of the row's log-probability: above rounding in bfloat16, and small enough to be linear
_MAX_RATE = 1e6


def linear_loss(
    rows: Sequence[Sequence[int]],
    gradients: Sequence[Sequence[float]],
    logprobs: Sequence[Sequence[float]],
    reduction: Reduction,
) -> tuple[list[Datum], LossName]:
    """Return the request whose gradient is ``gradients``: d(loss)/d(logprob) of each token after a row's first.

    Under ``sum`` it is a cross-entropy with weights -gradient. Under ``row_mean`` weights cannot carry it, as they are
    divided by their sum. There it is importance sampling with advantages -gradient, without weights, at
    ``logprobs``, which are the policy's own just now: so the ratio is 1, and its derivative too.
    """
    if reduction == "sum":
        inputs = [{"weights": [-g for g in row]} for row in gradients]
        return _data(rows, inputs), "cross_entropy"
    factors = [len(rows) * len(row) for row in gradients]
    inputs = [
        {"advantages": [-g * factor for g in row], "logprobs": current}
        for row, current, factor in zip(gradients, logprobs, factors, strict=True)
    ]
    return _data(rows, inputs), "importance_sampling"


def _data(rows: Sequence[Sequence[int]], inputs: Sequence[Mapping[str, Sequence[float]]]) -> list[Datum]:
    return [Datum(token_ids=row, inputs=one) for row, one in zip(rows, inputs, strict=True)]


def forward(model: RemoteModel, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probabilities of each row's tokens after the first, in nats."""
    data = _data(rows, [{"weights": [0.0] * (len(row) - 1)} for row in rows])
    return model.run(data, "cross_entropy", backward=False) if data else []


def probe(model: RemoteModel, row: Sequence[int]) -> Reduction:
    """Return how a service reduces losses, by training ``model`` a few small steps on ``row``.

    Raises:
        ConfigError: the weights do not move, or in a way that is neither reduction.
    """
    one = Datum(token_ids=row, inputs={"weights": [1.0] * (len(row) - 1)})
    quarter = Datum(token_ids=row, inputs={"weights": [0.25] * (len(row) - 1)})
    rate, wanted = 1e-6, -_RESPONSE * sum(forward(model, [row])[0])
    while (response := _response(model, [[one]], rate)) < wanted / 10:
        rate *= 10
        if rate > _MAX_RATE:
            raise ConfigError(
                f"the service's model does not move: {len(row)} tokens are {response:.3g} nats more likely after a "
                "step on them; check that its LoRA adapters are trained, or set engine.reduction yourself"
            )
    rate *= wanted / response
    found, base = [], _response(model, [[one]], rate)
    for calls in ([[quarter]], [[one, one]], [[one], [one]]):
        response, after = _response(model, calls, rate), _response(model, [[one]], rate)
        # The gradient shrinks as the row becomes likely, so each is compared with one before it and one after.
        found.append(max(response, 0) / math.sqrt(max(base * after, 1e-30)))
        base = after
    for name, factors in _FACTORS.items():
        if all(abs(f / g - 1) < _TOLERANCE for f, g in zip(found, factors, strict=True)):
            _check_signs(model, row, name, rate, base)
            return name
    raise ConfigError(
        "the service reduces losses in a way that is not known: a quarter of the weight gives "
        f"{found[0]:.2f} of the gradient, two copies of a row {found[1]:.2f}, two requests {found[2]:.2f}; it is "
        "0.25, 2, 2 (a sum) or 1, 1, 1 (the mean of each row, then of rows). Set engine.reduction if you know better"
    )


def _check_signs(model: RemoteModel, row: Sequence[int], reduction: Reduction, rate: float, base: float) -> None:
    """Raise ConfigError unless the request of a step makes the row less likely where its gradient says so."""
    size = len(row) - 1
    gradient = [0.5 if reduction == "sum" else 0.5 / size] * size  # half of the opposite of that of weight 1
    data, loss = linear_loss([row], [gradient], forward(model, [row]), reduction)
    one = Datum(token_ids=row, inputs={"weights": [1.0] * size})
    response, after = _response(model, [data], rate, loss), _response(model, [[one]], rate)
    ratio = response / math.sqrt(max(base * after, 1e-30))
    if abs(ratio / -0.5 - 1) >= _TOLERANCE:
        raise ConfigError(
            f"the service reduces losses by {reduction}, and a gradient of -1/2 made {ratio:.2f} of what one of "
            f"1 makes: its {loss} does not carry numbers of either sign, and another request is not known"
        )


def _response(
    model: RemoteModel, calls: Sequence[Sequence[Datum]], rate: float, loss: LossName = "cross_entropy"
) -> float:
    """Return how many nats more likely the row is after one step of plain gradient descent on ``calls``."""
    row = calls[0][0].token_ids
    before = sum(forward(model, [row])[0])
    for data in calls:
        model.run(data, loss, backward=True)
    model.step(AdamStep(learning_rate=rate * _EPS, betas=(0.0, 0.0), eps=_EPS))
    return sum(forward(model, [row])[0]) - before
