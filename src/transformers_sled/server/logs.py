"""Structured log lines, one a request, which never hold the text that was spoken."""

import json
import logging
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import ServiceMetrics


logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """Formats records as JSON objects: time, level, event, and the record's `details`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "details", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json(*names: str) -> None:
    """Writes what the loggers of these names log to standard error, as JSON objects."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in names:
        named = logging.getLogger(name)
        named.addHandler(handler)
        named.setLevel(logging.INFO)
        named.propagate = False


class RequestLog:
    r"""
    Names every request by an id, counts it, and logs it when it is done.

    Args:
        app (`ASGIApp`):
            The application.
        metrics ([`ServiceMetrics`]):
            Where it counts.
    """

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        details: dict[str, Any] = {"request_id": request_id}
        scope.setdefault("state", {})["details"] = details
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
                status = message.get("status", 101)
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        start = time.perf_counter()
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            details.update(
                protocol=scope["type"],
                method=scope.get("method", "GET"),
                # Not the path itself, which may hold anything.
                route=getattr(route, "path", "unknown"),
                status=status,
                duration=round(time.perf_counter() - start, 3),
            )
            self.metrics.requests.labels(scope["type"], str(status)).inc()
            logger.info("request", extra={"details": details})
