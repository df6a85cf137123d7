"""Which web pages may use the server: a browser lets any page post to this machine, and says only whose page it is."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from localrun.errors import LocalrunError
from localrun.serve.errors import APIError

ANY = "*"


def checked_origins(given: Sequence[str]) -> list[str]:
    """Origins as browsers write them. Raises LocalrunError for what is none."""
    return [_checked(origin) for origin in given]


def _checked(origin: str) -> str:
    bare = origin.rstrip("/").lower()
    try:
        parts = urlsplit(bare)
        is_one = bool(parts.scheme and parts.netloc) and bare == f"{parts.scheme}://{parts.netloc}" and bare.isascii()
    except ValueError:
        is_one = False
    if origin != ANY and not is_one:
        raise LocalrunError(f"--allow-origin {origin!r}: expected scheme://host or scheme://host:port, or * for all")
    return bare


class OriginCheck:
    """Refuses what a page of another site asks for, for a server that has no key.

    A page whose name was made to lead to this machine (DNS rebinding) is its own site to the browser; it gives itself
    away by the name, in Host, that is neither an address nor localhost.

    Args:
        allowed: origins that may use the server; "*" for all.
        is_local: whether the server listens on this machine alone, so that no other name leads to it.
    """

    def __init__(self, app: Any, allowed: Sequence[str], is_local: bool):
        self._app, self._allowed, self._is_local = app, set(allowed), is_local
        self._hosts = {urlsplit(origin).hostname for origin in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(dict(scope["headers"]))):
            response = Response(msgspec.json.encode(error.body), error.status, media_type="application/json")
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> APIError | None:
        """Why these are refused; None if they are not."""
        if ANY in self._allowed:
            return None
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        if host and self._is_local and not self._is_own_name(host):
            return _forbidden(f"this server is not called {host[:100]}; use localhost, or start it with --api-key")
        if origin and origin not in self._allowed and origin.partition("://")[2] != host:
            return _forbidden(f"pages of {origin[:100]} may not use this server; see --allow-origin and --api-key")
        return None

    def _is_own_name(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name == "localhost" or name in self._hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _forbidden(message: str) -> APIError:
    return APIError(403, message, kind="permission_error", code="origin_not_allowed")
