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


# What routes say of them in OpenAPI.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"]},
                                "code": {"type": ["string", "null"]},
                            },
                        }
                    },
                }
            }
        },
    }
    for status, description in (
        (400, "A parameter is missing or wrong."),
        (401, "The API key is missing or wrong."),
        (403, "The service does not do this."),
        (404, "There is nothing of that name."),
        (413, "The body is too large."),
        (429, "Too many requests wait."),
        (503, "The service is starting, stopping or has failed."),
    )
}
