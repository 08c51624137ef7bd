"""Put the page into one file: style and script inside, and the answers that it would ask the server for.

The content security policy allows the script and the style that are written here, by their hashes, and nothing else;
what a rollout says enters the page as text, as it does when it is served.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

STATIC = Path(str(resources.files("backtalk"))) / "viewer" / "web" / "dist"  # built from viewer/web/src
_STYLE = '<link rel="stylesheet" href="/static/app.css" />'
_SCRIPT = '<script type="module" src="/static/app.js"></script>'


def packed(data: Any) -> str:
    """Return plain data as compressed JSON in base64."""
    text = json.dumps(data, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()


def one_file(frozen: Mapping[str, Any]) -> str:
    """Return the page with everything inside; ``frozen`` is what web/src/frozen.ts answers from."""
    html, style, script = ((STATIC / name).read_text() for name in ("index.html", "app.css", "app.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    data = json.dumps(frozen).replace("<", "\\u003c")
    answers = f'<script type="application/json" id="frozen">{data}</script>'
    inside = {
        "<title>": f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>',
        _STYLE: f"<style>{style}</style>",
        _SCRIPT: "",
        "</body>": f'{answers}\n<script type="module">{script}</script></body>',
    }
    for mark, text in inside.items():
        before, found, after = html.partition(mark)
        assert found, f"{STATIC / 'index.html'} lacks {mark}"
        html = before + text + after
    return html


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
