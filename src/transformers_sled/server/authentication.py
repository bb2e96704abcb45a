"""Who asks: API keys, in the headers in which the clients of several services send them."""

import hmac
from collections.abc import Mapping

from .errors import ServiceError
from .voice_library import get_owner


class Authenticator:
    r"""
    Checks API keys.

    Args:
        api_keys (`tuple[str, ...]`):
            The keys, one of which a request must bring. Where there are none, none is asked for.
    """

    def __init__(self, api_keys: tuple[str, ...]) -> None:
        self._api_keys = api_keys

    def check(self, api_key: str | None) -> str:
        r"""
        Checks a key, in a time that does not depend on how much of it is right.

        Args:
            api_key (`str`, *optional*):
                The key of the request.

        Returns:
            `str`: the owner of the key, which is empty where no keys are asked for.

        Raises:
            [`ServiceError`]: if the key is missing or wrong.
        """
        if not self._api_keys:
            return ""
        if not api_key:
            raise ServiceError(
                401,
                "An API key is missing. Send it as `Authorization: Bearer KEY`.",
                code="missing_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        matches = [hmac.compare_digest(get_owner(api_key), get_owner(known)) for known in self._api_keys]
        if not any(matches):
            raise ServiceError(
                401, "The API key is wrong.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return get_owner(api_key)


def read_api_key(headers: Mapping[str, str]) -> str | None:
    r"""
    Finds the key of a request.

    Args:
        headers (`Mapping[str, str]`):
            Headers by their names in small letters: `authorization` as OpenAI's clients (`Bearer`) and Deepgram's
            (`Token`) send it, `xi-api-key` as ElevenLabs' do, `sec-websocket-protocol` as Deepgram's do in browsers.

    Returns:
        `str`, *optional*: the key.
    """
    scheme, _, api_key = headers.get("authorization", "").partition(" ")
    if scheme.lower() in ("bearer", "token") and api_key.strip():
        return api_key.strip()
    if api_key := headers.get("xi-api-key", "").strip():
        return api_key
    scheme, _, api_key = headers.get("sec-websocket-protocol", "").partition(",")
    if scheme.strip().lower() in ("bearer", "token") and api_key.strip():
        return api_key.strip()
    return None
