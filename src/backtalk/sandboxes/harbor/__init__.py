"""Sandbox backend over any environment of Harbor (harborframework.com); importing it keeps Harbor's telemetry off.

Install Harbor with `pip install "backtalk[harbor]"` (Python 3.12 or newer); docs/harbor.md. The other way
round, Harbor's runner over our sandboxes, is `backtalk.hosts.harbor`. Tasks in Harbor's format need no Harbor: see
`backtalk.tasks.folder`.
"""

import os

# Harbor reports usage over the network unless told not to. Set it to 1 to allow that.
os.environ.setdefault("HARBOR_TELEMETRY", "0")
