"""What routes get besides their parameters."""

from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from .authentication import read_api_key
from .errors import ServiceError
from .service import SpeechService


def get_service(connection: HTTPConnection) -> SpeechService:
    """The service of the application."""
    return connection.app.state.service


def get_owner_of_key(connection: HTTPConnection) -> str:
    """Who asks, after a check of the key."""
    return get_service(connection).authenticator.check(read_api_key(connection.headers))


def get_details(connection: HTTPConnection) -> dict[str, Any]:
    """What is told of the request in the log."""
    return connection.scope["state"]["details"]


def get_owner_who_may_clone(connection: HTTPConnection) -> str:
    """Who asks, where voices may be made."""
    owner = get_owner_of_key(connection)
    if not get_service(connection).settings.cloning:
        raise ServiceError(403, "This service makes no voices.", code="cloning_off")
    return owner


Service = Annotated[SpeechService, Depends(get_service)]
Owner = Annotated[str, Depends(get_owner_of_key)]
CloningOwner = Annotated[str, Depends(get_owner_who_may_clone)]
Details = Annotated[dict[str, Any], Depends(get_details)]
