"""WebSockets: who may open one, and how long it may stay silent or unread."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from .authentication import read_api_key
from .errors import ServiceError
from .service import SpeechService


class Connection:
    r"""
    A WebSocket on which text comes and speech goes.

    Args:
        websocket (`WebSocket`):
            The WebSocket, which is not accepted yet.
        service ([`SpeechService`]):
            The service.
    """

    def __init__(self, websocket: WebSocket, service: SpeechService) -> None:
        self.websocket = websocket
        self.service = service
        self.details: dict[str, Any] = websocket.scope["state"]["details"]
        self._sending = asyncio.Lock()
        self._is_over = asyncio.Event()

    async def refuse(self, error: ServiceError) -> None:
        """Answers the handshake with an error."""
        self.details["error"] = error.code or error.message
        await self.websocket.send_denial_response(JSONResponse(error.body, error.status, error.headers))

    def authenticate(self) -> str:
        r"""
        Checks who asks.

        Returns:
            `str`: the owner of the key.

        Raises:
            [`ServiceError`]: if the key is missing or wrong, or a web page of elsewhere asks in a reader's browser.
        """
        headers = self.websocket.headers
        origin = headers.get("origin")
        is_foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
        if is_foreign and origin not in self.service.settings.cors_origins:
            raise ServiceError(403, f"Pages of {origin} may not use this service.", code="origin_not_allowed")
        return self.service.authenticator.check(read_api_key(headers))

    async def accept(self, headers: dict[str, str] | None = None) -> None:
        """Accepts the WebSocket."""
        self.service.metrics.connections.inc()
        subprotocols = self.websocket.scope["subprotocols"]
        await self.websocket.accept(
            subprotocols[0] if subprotocols else None,
            [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        )

    async def send(self, message: dict[str, Any] | bytes) -> None:
        """Sends a message. Raises `WebSocketDisconnect` if the client has left or does not read."""
        if self._is_over.is_set():
            raise WebSocketDisconnect(1006)
        async with self._sending:
            sending = (
                self.websocket.send_bytes(message)
                if isinstance(message, bytes)
                else self.websocket.send_text(json.dumps(message))
            )
            try:
                await asyncio.wait_for(sending, self.service.settings.client_timeout)
            except asyncio.TimeoutError as error:
                self.details["error"] = "slow_reader"
                self._is_over.set()
                raise WebSocketDisconnect(1008, "slow reader") from error
            except RuntimeError as error:
                self._is_over.set()
                raise WebSocketDisconnect(1006) from error

    async def fail(self, message: dict[str, Any], error: ServiceError) -> None:
        """Sends a message about an error, and lets `receive` end."""
        self.details["error"] = error.code or error.message
        with contextlib.suppress(WebSocketDisconnect):
            await self.send(message)
        self._is_over.set()

    async def receive(self, is_idle: Callable[[], bool]) -> dict[str, Any]:
        r"""
        Waits for the next message.

        Args:
            is_idle (`Callable[[], bool]`):
                Tells whether nothing is being spoken, so that silence counts.

        Returns:
            `dict`: the message, which is a JSON object.

        Raises:
            [`ServiceError`]: if the message is no such thing.
            `WebSocketDisconnect`: if the client has left, is silent for too long, or has been told of an error.
        """
        receiving = asyncio.ensure_future(self.websocket.receive())
        ending = asyncio.ensure_future(self._is_over.wait())
        try:
            while not (receiving.done() or ending.done()):
                timeout = self.service.settings.idle_timeout
                await asyncio.wait([receiving, ending], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not (receiving.done() or ending.done()) and is_idle():
                    self.details["error"] = "idle"
                    raise WebSocketDisconnect(1000, "idle")
            if ending.done():
                raise WebSocketDisconnect(1011)
            message = receiving.result()
        finally:
            receiving.cancel()
            ending.cancel()
        if message["type"] == "websocket.disconnect":
            self._is_over.set()
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        if text is None:
            raise ServiceError(400, "Messages must be JSON in text, got bytes.", code="invalid_message")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ServiceError(400, "The message is no JSON.", code="invalid_message") from error
        if not isinstance(content, dict):
            raise ServiceError(400, "The message is no JSON object.", code="invalid_message")
        return content

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Closes the WebSocket, if it is open, after it was accepted."""
        self.service.metrics.connections.dec()
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, asyncio.TimeoutError):
            await asyncio.wait_for(self.websocket.close(code, reason[:100]), self.service.settings.client_timeout)


def get_text(message: dict[str, Any], name: str = "text") -> str:
    """A string of a message. Raises a [`ServiceError`] if it is something else."""
    text = message.get(name)
    if not isinstance(text, str):
        raise ServiceError(400, f"`{name}` must be a string.", name, "invalid_message")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ServiceError(400, f"`{name}` must be valid Unicode.", name, "invalid_message") from error
    return text
