"""Harbor (harborframework.com), both ways: its runner over our sandbox, its environments under our rollouts.

    environment  a Harbor BaseEnvironment over our sandbox, for `harbor run --environment-import-path`
    backend      a SandboxBackend of ours over any Harbor environment
    tasks        tasks of a Harbor dataset, in Harbor's own images, scored by Harbor's own verifier
    atif         our trajectories as ATIF; reading them is `backtalk.exchange.read`

Tasks in Harbor's format need none of this, nor Harbor: see `backtalk.tasks.folder`. Here Harbor is imported only by the
modules that run it; install it with `pip install "backtalk[harbor]"` (Python 3.12 or newer). docs/harbor.md.
"""

import os

# Harbor reports usage over the network unless told not to. Nothing here does so unasked: set it to 1 to allow it.
os.environ.setdefault("HARBOR_TELEMETRY", "0")
