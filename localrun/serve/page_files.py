"""The page at /: the files of page/, as they are in the package, and what browsers may do with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Scripts, styles and requests of this server alone; nothing within the page's text is one; no frame around it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # another version of the package may be at the same address tomorrow
}


def is_page(path: str) -> bool:
    """Whether a path is the page's. It holds nothing of the model or of anybody's, so that it needs no key."""
    return path == "/" or path.startswith("/page/")


def page_routes() -> list[Route]:
    """A route for each file; / is the page itself."""
    bundle = [file for file in files("localrun.serve").joinpath("page").iterdir() if file.is_file()]
    return [
        Route("/" if file.name == "index.html" else f"/page/{file.name}", _endpoint(file.name, file.read_bytes()))
        for file in bundle
    ]


def _endpoint(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=_TYPES[name.rpartition(".")[2]])

    return answer
