"""Errors that the service answers with."""

from typing import Any


class ServiceError(Exception):
    r"""
    An error that a client is told.

    Args:
        status (`int`):
            Status of the HTTP response.
        message (`str`):
            What is wrong and how to mend it.
        param (`str`, *optional*):
            The parameter that is meant.
        code (`str`, *optional*):
            A name of the error for programs.
        headers (`dict[str, str]`, *optional*):
            Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
