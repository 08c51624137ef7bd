"""Every error Backtalk raises on purpose, in one tree.

A message says what was got, why that cannot work, and what to type instead.
"""


class BacktalkError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class ConfigError(BacktalkError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(BacktalkError, ValueError):
    """A file or record that cannot be read, or does not hold what it promises."""


class TaskError(BacktalkError):
    """A task that cannot be run: no instruction, no tests, an unsupported environment."""


class RenderError(BacktalkError, ValueError):
    """A chat template or tokenizer that cannot carry a rollout without re-tokenising history."""


class SandboxUnavailable(BacktalkError):
    """This machine offers no safe sandbox; the message says what to install."""


class InfrastructureError(BacktalkError):
    """The world broke, not the policy. Costs one rollout and never becomes a reward."""


class SandboxError(InfrastructureError):
    """A sandbox died, could not start, or stopped answering."""


class VerifierError(InfrastructureError):
    """The verifier crashed, timed out, or left no finite reward: the rollout has no reward at all."""


class SamplerError(InfrastructureError):
    """The policy could not be sampled from."""


def merge_repeats(errors: ExceptionGroup[Exception]) -> Exception:
    """Return the only error of a group as it was raised, or the group with each that says the same once."""
    found: dict[tuple[type, str], Exception] = {}
    for error in errors.exceptions:
        found.setdefault((type(error), str(error)), error)
    first, *others = found.values()
    return errors.derive([first, *others]) if others else first
