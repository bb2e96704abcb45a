"""Bodies of requests: how large they may be, and how long they may take."""

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ServiceError


class RequestBodies:
    r"""
    Reads the bodies of requests before they are looked at.

    Args:
        app (`ASGIApp`):
            The application.
        max_bytes (`int`):
            Size that a body may have.
        timeout (`float`):
            Seconds that it may take.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            message: Message | None = await asyncio.wait_for(self._read(receive), self.timeout)
        except asyncio.TimeoutError:
            await self._refuse(ServiceError(408, "The body of the request took too long."), scope, receive, send)
            return
        except ServiceError as error:
            await self._refuse(error, scope, receive, send)
            return

        async def receive_again() -> Message:
            nonlocal message
            if message is None:
                return await receive()
            first, message = message, None
            return first

        await self.app(scope, receive_again, send)

    async def _read(self, receive: Receive) -> Message:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise ServiceError(413, f"The body of the request must have at most {self.max_bytes} bytes.")
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}

    async def _refuse(self, error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
        details: dict[str, Any] = scope["state"]["details"]
        details["error"] = error.message
        # The rest of the body is not waited for.
        await JSONResponse(error.body, error.status, {"connection": "close"})(scope, receive, send)
