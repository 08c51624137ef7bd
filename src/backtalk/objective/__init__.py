"""The training objective: GRPO on action tokens plus the world-model term on environment output.

``loss`` is the objective on one page, and its functions can be imported from here. PyTorch is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backtalk.objective.loss import objective, world_model_loss, world_model_loss_from_masks

__all__ = ["objective", "world_model_loss", "world_model_loss_from_masks"]


def __getattr__(name: str) -> Any:
    """Import a function of ``loss`` on first use, so that settings can be read without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module("backtalk.objective.loss"), name)
