"""Responses that are made while they are sent."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

import anyio
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from .errors import ServiceError


class SpeechResponse(Response):
    r"""
    A response whose body comes from an asynchronous generator, which is closed at once when the client leaves, or does not
    read for too long. Its status is that of a [`ServiceError`] which the generator raises before its first bytes.

    Args:
        content (`AsyncGenerator[bytes, None]`):
            The body.
        client_timeout (`float`):
            Seconds that the client has to take some bytes.
        media_type (`str`):
            Type of the content.
        headers (`Mapping[str, str]`, *optional*):
            Headers.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        client_timeout: float,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.content = content
        self.client_timeout = client_timeout
        self.media_type = media_type
        self.status_code = 200
        self.background = None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch, receive, group.cancel_scope)
            async with contextlib.aclosing(self.content):
                await self._send(scope, receive, send)
            group.cancel_scope.cancel()

    async def _watch(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        details = scope["state"]["details"]
        has_started = False
        try:
            async for data in self.content:
                if not has_started:
                    has_started = True
                    start: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                    await asyncio.wait_for(send(start), self.client_timeout)
                body: Message = {"type": "http.response.body", "body": data, "more_body": True}
                await asyncio.wait_for(send(body), self.client_timeout)
            await asyncio.wait_for(send({"type": "http.response.body", "body": b""}), self.client_timeout)
        except ServiceError as error:
            details["error"] = error.code or error.message
            if not has_started:
                response = JSONResponse(error.body, error.status, error.headers)
                await response(scope, receive, send)
            # Else the body ends before its end is told, which clients take for what it is.
        except asyncio.TimeoutError:
            details["error"] = "slow_reader"
