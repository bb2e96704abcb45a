"""Voices in a folder that several processes share, each with a library of its own."""

import numpy as np
import pytest

from transformers_sled.server.errors import ServiceError
from transformers_sled.server.voice_library import VoiceLibrary


WAVEFORM = np.zeros(2_000, np.float32)


@pytest.fixture(params=["folder", "url"])
def folder(request, tmp_path) -> str:
    return str(tmp_path / "not" / "there") if request.param == "folder" else f"memory://{tmp_path.name}/voices"


def test_what_one_makes_or_deletes_the_others_know(folder):
    first, second = VoiceLibrary(folder), VoiceLibrary(folder)
    assert second.get_voices("anna") == [] and second.get_consents("anna") == []
    consent = first.add_consent("Anna", "en", WAVEFORM, 16_000, "anna")
    assert second.get_consent(consent.id, "anna") == consent
    voice = first.add("anna", "Two plus two.", WAVEFORM, 16_000, consent, "anna")
    assert second.get("anna", "anna") == second.get(voice.id, "anna") == voice
    assert second.get(voice.id, "anna").read().startswith(b"fLaC")
    assert second.get_voices("anna") == [voice] and second.get_voices("another") == []
    with pytest.raises(ServiceError):
        second.get(voice.id, "another")
    second.delete_consent(consent.id, "anna")
    for library in (first, second):
        assert library.get_voices("anna") == []
        with pytest.raises(ServiceError):
            library.get_consent(consent.id, "anna")
