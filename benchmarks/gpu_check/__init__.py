"""Checks and measurements of the embedded engine on one device; `scripts/gpu_check` runs them."""
