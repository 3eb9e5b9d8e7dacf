"""`/` and `/page/NAME`: the page for people, a handful of files that lie beside the server.

Only the files listed here are ever served, by their exact names, and without a key: there is no secret in
them, and a browser asks for them before anybody could type one in. What the page shows it gets from the
routes that need one (`/state`, `/v1/...`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).resolve().parent.parent / "page"
SCRIPT, STYLE = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
FILES = {
    "style.css": STYLE,
    "icon.svg": "image/svg+xml",
    "theme.js": SCRIPT,
    **dict.fromkeys(
        ("main.js", "dom.js", "api.js", "sse.js", "tokens.js", "talk.js", "plots.js", "server.js"), SCRIPT
    ),
}
PATHS = {"/": "index.html", **{f"/page/{name}": name for name in FILES}}
# Nothing inline, nothing from elsewhere, no frame around it, and no text that becomes markup: what a model
# or another user wrote cannot become a script, whatever the page does with it (W3C: CSP Level 3, Trusted
# Types).
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked about each time: an upgrade shows at once
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class _File:
    def __init__(self, name: str) -> None:
        self.body = (FOLDER / name).read_bytes()
        self.tag = f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'
        self.headers = {
            **HEADERS,
            "ETag": self.tag,
            "Content-Type": FILES.get(name, "text/html; charset=utf-8"),
        }

    def response(self, known: str) -> Response:
        """304 to a browser that has it. `known`: the request's If-None-Match (RFC 9110, section 13.1.2)."""
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
        if self.tag in tags or known.strip() == "*":
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


def page_routes() -> list[Route]:
    """Reads the files once. Raises OSError where one is missing."""
    files = {path: _File(name) for path, name in PATHS.items()}

    async def serve_file(http: Request) -> Response:
        return files[http.scope["path"]].response(http.headers.get("if-none-match", ""))

    return [Route(path, serve_file, methods=["GET"], include_in_schema=False) for path in PATHS]
