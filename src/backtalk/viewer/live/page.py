"""Put the page into one file: styles, scripts and pictures inside, and the answers that it would ask the server for.

Scripts stay modules: an import map names each of them, as a data URL. The content security policy allows these, the
two scripts and the styles that are written here, by their hashes, and nothing else; what a rollout says enters the page
as text, as it does when it is served.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

STATIC = Path(str(resources.files("backtalk"))) / "viewer" / "live" / "static"
_LINKED = re.compile(r'<link rel="stylesheet" href="/static/([\w./]+)">\n')
_SCRIPT = re.compile(r'<script type="module" src="/static/([\w./]+)"></script>\n')
_IMPORT = re.compile(r'(from|import) "\./([\w./]+)"')


def packed(data: Any) -> str:
    """Return plain data as compressed JSON in base64."""
    text = json.dumps(data, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()


def one_file(frozen: Mapping[str, Any]) -> str:
    """Return the page with everything inside; ``frozen`` is what static/frozen.js answers from."""
    html = (STATIC / "index.html").read_text()
    styles = "".join(_style(name) for name in _LINKED.findall(html))
    (entry,) = _SCRIPT.findall(html)
    modules = {f"backtalk/{path.relative_to(STATIC)}": _module(path) for path in sorted(STATIC.rglob("*.js"))}
    import_map, start = json.dumps({"imports": modules}), f'import "backtalk/{entry}";'
    allowed = " ".join(_hash(text) for text in (import_map, start))
    policy = (
        f"default-src 'none'; script-src data: {allowed}; style-src {_hash(styles)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    data = json.dumps(frozen).replace("<", "\\u003c")
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{styles}</style>\n'
        f'<script type="importmap">{import_map}</script>\n'
    )
    tail = f'<script type="application/json" id="frozen">{data}</script>\n<script type="module">{start}</script>\n'
    html = _SCRIPT.sub("", _LINKED.sub("", html))
    return html.replace("<title>", f"{head}<title>", 1).replace("</body>", f"{tail}</body>", 1)


def _style(name: str) -> str:
    return (STATIC / name).read_text().strip() + "\n"


def _module(path: Path) -> str:
    folder = path.parent.relative_to(STATIC)
    text = _IMPORT.sub(lambda match: f'{match[1]} "backtalk/{folder / match[2]}"', path.read_text())
    return f"data:text/javascript;base64,{base64.b64encode(text.encode()).decode()}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
