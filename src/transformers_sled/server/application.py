"""The speech service as an ASGI application, and the server that runs it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from .. import __version__
from . import deepgram_api, elevenlabs_api, openai_api
from .dependencies import Owner, Service
from .errors import ERROR_RESPONSES, ServiceError
from .logs import RequestLog, log_as_json
from .request_bodies import RequestBodies
from .service import SpeechService, SynthesizerLoader
from .settings import ServiceSettings
from .synthesizers import load_synthesizers


SEND_BUFFER_BYTES = 2**17

PAGE = Path(__file__).parent / "page"
# Everything that the page needs comes from here.
PAGE_POLICY = "default-src 'self'; img-src data:; frame-ancestors 'self' https://huggingface.co"


def create_app(settings: ServiceSettings | None = None, load: SynthesizerLoader = load_synthesizers) -> FastAPI:
    r"""
    Makes the speech service.

    Args:
        settings ([`ServiceSettings`], *optional*):
            Its settings. By default the two voices in the box speak, and no keys are asked for.
        load (`Callable[[ServiceSettings, ServiceMetrics], list[Synthesizer]]`, *optional*):
            Makes its models; by default in this process.

    Returns:
        [`~fastapi.FastAPI`]: the application, which loads the models when it starts.

    Example:

    ```python
    >>> import uvicorn
    >>> from transformers_sled.server import create_app

    >>> uvicorn.run(create_app(), port=8000)
    ```
    """
    service = SpeechService(ServiceSettings() if settings is None else settings, load)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.run():
            yield

    app = FastAPI(
        title="transformers-sled",
        summary="Speech that streams out while text streams in.",
        version=__version__,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    for api in (openai_api, deepgram_api, elevenlabs_api):
        app.include_router(api.router)
    app.add_exception_handler(ServiceError, _answer_service_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_exception)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "retry-after", "x-ignored-parameters"],
        )
    app.add_middleware(
        RequestBodies, max_bytes=service.settings.max_body_bytes, timeout=service.settings.client_timeout
    )
    app.add_middleware(RequestLog, metrics=service.metrics)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": PAGE_POLICY})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.get("/health", responses={503: {"description": "A model does not speak any more: restart the service."}})
    async def health(service: Service) -> JSONResponse:
        """Whether the service works, or has to be restarted."""
        is_healthy = service.is_healthy
        return JSONResponse({"status": "ok" if is_healthy else "failed"}, 200 if is_healthy else 503)

    @app.get("/ready", responses={503: {"description": "The service is starting or stopping, or has failed."}})
    async def ready(service: Service) -> JSONResponse:
        """Whether the service takes requests."""
        is_ready = service.is_ready
        content = {
            "status": "ready" if is_ready else "not ready",
            "watermark": service.settings.is_watermarking,
            "recognizer": service.settings.recognizer is not None,
        }
        return JSONResponse(content, 200 if is_ready else 503)

    @app.get("/metrics", response_class=Response, responses={401: ERROR_RESPONSES[401]})
    async def metrics(owner: Owner, service: Service) -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _answer_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    request.scope["state"]["details"]["error"] = error.code or error.message
    return JSONResponse(error.body, error.status, error.headers)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = names[0] if names else None
    message = f"`{'.'.join(names)}`: {first['msg']}." if names else f"{first['msg']}."
    return await _answer_service_error(request, ServiceError(400, message, param, first["type"]))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return await _answer_service_error(request, ServiceError(error.status_code, str(error.detail), headers=headers))


async def _answer_exception(request: Request, error: Exception) -> Response:
    return await _answer_service_error(request, ServiceError(500, "Something went wrong in the service."))


class SpeechServer(uvicorn.Server):
    r"""
    Runs the application, and lets what is being spoken end before it stops.

    Args:
        settings ([`ServiceSettings`]):
            Settings of the service.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        port (`int`, *optional*, defaults to 8000):
            Port to listen on; 0 takes a free one.
        certificate, private_key (`str`, *optional*):
            Files for HTTPS.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        host: str = "127.0.0.1",
        port: int = 8000,
        certificate: str | None = None,
        private_key: str | None = None,
    ) -> None:
        self.app = create_app(settings)
        self.service: SpeechService = self.app.state.service
        config = uvicorn.Config(
            self.app,
            host=host,
            port=port,
            ssl_certfile=certificate,
            ssl_keyfile=private_key,
            access_log=False,
            log_config=None,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=settings.shutdown_timeout,
            ws_max_size=2**20,
            server_header=False,
        )
        super().__init__(config)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Runs until a signal, or `should_exit`. Raises `OSError` if it cannot listen."""
        super().run([self._listen()] if sockets is None else sockets)

    def _listen(self) -> socket.socket:
        host, port = self.config.host, self.config.port
        try:
            listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {host}, port {port}: {error.strerror}") from error
        # Connections inherit it: what a client has not read is held back in its stream, not in the system's memory.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return listener

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.is_draining = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drain(), self.config.timeout_graceful_shutdown)
        await super().shutdown(sockets)

    async def _drain(self) -> None:
        while self.service.num_speeches and not self.force_exit:
            await asyncio.sleep(0.05)


def run_service(settings: ServiceSettings, host: str = "127.0.0.1", port: int = 8000, **kwargs: str | None) -> None:
    """Runs the service until it is told to stop, with log lines in JSON. See [`SpeechServer`] for the arguments."""
    log_as_json("transformers_sled.server", "uvicorn")
    SpeechServer(settings, host, port, **kwargs).run()
