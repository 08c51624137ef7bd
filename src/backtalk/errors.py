"""All errors that Backtalk raises on purpose, in one class tree.

A message says what was got, why that cannot work, and what to type instead.
"""


class BacktalkError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class ConfigError(BacktalkError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(BacktalkError, ValueError):
    """A file or record that cannot be read or written, or does not hold what its format says."""


class TaskError(BacktalkError):
    """A task that cannot be run: no instruction, no tests, an unsupported environment."""


class RenderError(BacktalkError, ValueError):
    """A chat template or tokenizer that cannot carry a rollout without re-tokenising history."""


class SandboxUnavailable(BacktalkError):
    """This machine offers no safe sandbox; the message says what to install."""


class InfrastructureError(BacktalkError):
    """An environment, sandbox or sampler broke, not the policy: the rollout has no reward, not a reward of 0."""


class SandboxError(InfrastructureError):
    """A sandbox died, could not start, or stopped answering."""


class VerifierError(InfrastructureError):
    """The verifier crashed, timed out, or left no finite reward."""


class SamplerError(InfrastructureError):
    """The policy could not be sampled."""


class SamplerFault(BacktalkError):
    """The sampler is gone, or samples from other weights than the trained: the run stops, no rollout is to blame."""


def merge_repeats(errors: ExceptionGroup[Exception]) -> Exception:
    """Return the group without repeats of the same type and message, or its only error if one is left."""
    found: dict[tuple[type, str], Exception] = {}
    for error in errors.exceptions:
        found.setdefault((type(error), str(error)), error)
    first, *others = found.values()
    return errors.derive([first, *others]) if others else first
