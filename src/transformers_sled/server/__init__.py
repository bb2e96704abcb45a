"""The speech service. It needs the extra `serve`."""

from .application import SpeechServer, create_app, run_service
from .settings import ServiceSettings


__all__ = ["ServiceSettings", "SpeechServer", "create_app", "run_service"]
