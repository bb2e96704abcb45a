"""The voices that the service speaks in: those of the box, and those that its clients made, which are kept on disk."""

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from .errors import ServiceError


# The voice that a model takes where it has none by name.
DEFAULT_VOICE = "default"

# The names of OpenAI's voices, and which of the box speaks for each.
OPENAI_VOICES = {
    "alloy": "af_heart",
    "ash": "am_michael",
    "ballad": "am_michael",
    "cedar": "am_michael",
    "coral": "af_heart",
    "echo": "am_michael",
    "fable": "bf_emma",
    "marin": "af_heart",
    "nova": "af_heart",
    "onyx": "am_michael",
    "sage": "bf_emma",
    "shimmer": "bf_emma",
    "verse": "am_michael",
}

# Longer samples leave less room for the speech.
MAX_SAMPLE_SECONDS = 30.0
MIN_SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Voice:
    """
    A voice: its name, what its recording says, and where that is. What models bring along has no recording. `owner` is
    empty where everyone may use it.
    """

    id: str
    name: str
    prompt_text: str = ""
    recording: Path | None = None
    owner: str = ""
    consent: str = ""
    created_at: int = 0


@dataclass(frozen=True)
class Consent:
    """A recording in which a speaker agrees to have their voice cloned."""

    id: str
    name: str
    language: str
    owner: str
    created_at: int


class VoiceLibrary:
    r"""
    Finds voices by their names, and keeps those that clients make.

    Args:
        folder (`Path`):
            Where they are kept: each a recording with a description beside it, which a restart finds again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shared: dict[str, Voice] = {}
        self._default_name = DEFAULT_VOICE
        self._own: dict[str, Voice] = {}
        self._consents: dict[str, Consent] = {}
        for file in sorted(folder.glob("voice_*.json")):
            voice = json.loads(file.read_text())
            self._own[voice["id"]] = Voice(**{**voice, "recording": folder / voice["recording"]})
        for file in sorted(folder.glob("cons_*.json")):
            consent = Consent(**json.loads(file.read_text()))
            self._consents[consent.id] = consent

    @property
    def default(self) -> Voice:
        """The voice that is taken where none is named: what a model takes by itself."""
        return self._shared.get(self._default_name, Voice(self._default_name, self._default_name))

    def add_shared(self, names: Sequence[str], default: str | None) -> None:
        """Adds the voices that a model brings along, and takes its default one as the default."""
        for name in names:
            self._shared.setdefault(name, Voice(name, name))
        self._default_name = default or self._default_name

    def get_voices(self, owner: str) -> list[Voice]:
        """The voices that the owner of a key may use."""
        return [*self._shared.values(), *(voice for voice in self._own.values() if voice.owner == owner)]

    def get(self, name: str, owner: str) -> Voice:
        r"""
        Finds a voice.

        Args:
            name (`str`):
                Its id or name, or one of OpenAI's names.
            owner (`str`):
                Who asks, as [`get_owner`] gives it.

        Raises:
            [`ServiceError`]: if there is none, or it belongs to another.
        """
        if name in self._shared:
            return self._shared[name]
        if name in OPENAI_VOICES or name == DEFAULT_VOICE:
            return self._shared.get(OPENAI_VOICES.get(name, ""), self.default)
        for voice in self._own.values():
            if voice.owner == owner and name in (voice.id, voice.name):
                return voice
        names = ", ".join(voice.id for voice in self.get_voices(owner))
        raise ServiceError(
            400, f"Voice {name!r} does not exist. There are {names}, and OpenAI's names.", "voice", "voice_not_found"
        )

    def get_consents(self, owner: str) -> list[Consent]:
        """The consents that the owner of a key has given."""
        return [consent for consent in self._consents.values() if consent.owner == owner]

    def get_consent(self, consent_id: str, owner: str) -> Consent:
        """Finds a consent. Raises a [`ServiceError`] if there is none, or it belongs to another."""
        consent = self._consents.get(consent_id)
        if consent is None or consent.owner != owner:
            raise ServiceError(404, f"Consent {consent_id!r} does not exist.", "consent", "consent_not_found")
        return consent

    def add_consent(self, name: str, language: str, waveform: np.ndarray, sampling_rate: int, owner: str) -> Consent:
        """Keeps a consent: a waveform `(num_samples,)` in float32."""
        consent = Consent(f"cons_{secrets.token_hex(12)}", name, language, owner, int(time.time()))
        self._write(consent.id, asdict(consent), waveform, sampling_rate)
        self._consents[consent.id] = consent
        return consent

    def add(
        self,
        name: str,
        prompt_text: str,
        waveform: np.ndarray,
        sampling_rate: int,
        consent: Consent,
        owner: str,
    ) -> Voice:
        """Keeps a voice: a waveform `(num_samples,)` in float32, and what it says."""
        voice_id = f"voice_{secrets.token_hex(12)}"
        recording = self.folder / f"{voice_id}.flac"
        voice = Voice(voice_id, name, prompt_text, recording, owner, consent.id, int(time.time()))
        self._write(voice_id, {**asdict(voice), "recording": recording.name}, waveform, sampling_rate)
        self._own[voice_id] = voice
        return voice

    def delete(self, voice_id: str, owner: str) -> None:
        """Deletes a voice. Raises a [`ServiceError`] if there is none, or it belongs to another."""
        voice = self._own.get(voice_id)
        if voice is None or voice.owner != owner:
            raise ServiceError(404, f"Voice {voice_id!r} does not exist.", "voice_id", "voice_not_found")
        del self._own[voice_id]
        self._remove(voice_id)

    def delete_consent(self, consent_id: str, owner: str) -> None:
        """Deletes a consent, and with it the voices that were made on it."""
        self.get_consent(consent_id, owner)
        for voice in [voice for voice in self._own.values() if voice.consent == consent_id]:
            self.delete(voice.id, owner)
        del self._consents[consent_id]
        self._remove(consent_id)

    def _write(self, name: str, description: dict[str, Any], waveform: np.ndarray, sampling_rate: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        soundfile.write(self.folder / f"{name}.flac", waveform, sampling_rate)
        # Last and in one go, because a voice is there when its description is.
        temporary = self.folder / f"{name}.json.tmp"
        temporary.write_text(json.dumps(description, indent=2) + "\n")
        temporary.replace(self.folder / f"{name}.json")

    def _remove(self, name: str) -> None:
        for suffix in (".json", ".flac"):
            (self.folder / f"{name}{suffix}").unlink(missing_ok=True)


def get_owner(api_key: str) -> str:
    """Names the owner of a key without giving the key away: empty where no keys are asked for."""
    return hashlib.sha256(api_key.encode()).hexdigest()[:32] if api_key else ""
