"""What a request can be refused for, in the form of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class APIError(Exception):
    """A request that gets an error for an answer.

    Attributes:
        status: of HTTP.
        kind: the API's "type".
        param: the field of the body that it is about.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """A request with something wrong in it."""
    return APIError(400, message, param=param, code=code)


def unsupported(param: str, what: str = "") -> APIError:
    """A request for what the API has and this server has not."""
    return invalid(f"{what or param} is not supported by this server", param, "unsupported_parameter")


def failed(message: str) -> APIError:
    """Something that is not the client's fault."""
    return APIError(500, message, kind="server_error")
