"""The voices that the service speaks in: those of the box, and those that its clients made, which are kept in a folder."""

import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile
from fsspec.implementations.local import LocalFileSystem

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
    A voice: its name, what its recording says, and the path or URL of that. What models bring along has no recording.
    `owner` is empty where everyone may use it.
    """

    id: str
    name: str
    prompt_text: str = ""
    recording: str | None = None
    owner: str = ""
    consent: str = ""
    created_at: int = 0

    def read(self) -> bytes:
        """The file of its recording."""
        if self.recording is None:
            raise ValueError(f"Voice {self.id!r} has no recording.")
        with fsspec.open(self.recording, "rb") as file:
            return file.read()


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
        folder (`str` or `Path`):
            Where they are kept, each a recording with a description beside it: a path, or a URL that fsspec opens.
            Libraries of several processes may share it; a voice that one of them makes is known to all of them.
    """

    def __init__(self, folder: str | Path) -> None:
        self._files, self._folder = fsspec.core.url_to_fs(str(folder))
        self._shared: dict[str, Voice] = {}
        self._default_name = DEFAULT_VOICE
        # What was read of the folder, where a description never changes.
        self._descriptions: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

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
        return [*self._shared.values(), *self._get_own(owner)]

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
        for voice in self._get_own(owner):
            if name in (voice.id, voice.name):
                return voice
        names = ", ".join(voice.id for voice in self.get_voices(owner))
        raise ServiceError(
            400, f"Voice {name!r} does not exist. There are {names}, and OpenAI's names.", "voice", "voice_not_found"
        )

    def get_consents(self, owner: str) -> list[Consent]:
        """The consents that the owner of a key has given."""
        consents = [Consent(**description) for description in self._read_all("cons_")]
        return [consent for consent in consents if consent.owner == owner]

    def get_consent(self, consent_id: str, owner: str) -> Consent:
        """Finds a consent. Raises a [`ServiceError`] if there is none, or it belongs to another."""
        for consent in self.get_consents(owner):
            if consent.id == consent_id:
                return consent
        raise ServiceError(404, f"Consent {consent_id!r} does not exist.", "consent", "consent_not_found")

    def add_consent(self, name: str, language: str, waveform: np.ndarray, sampling_rate: int, owner: str) -> Consent:
        """Keeps a consent: a waveform `(num_samples,)` in float32."""
        consent = Consent(f"cons_{secrets.token_hex(12)}", name, language, owner, int(time.time()))
        self._write(consent.id, asdict(consent), waveform, sampling_rate)
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
        recording = self._files.unstrip_protocol(f"{self._folder}/{voice_id}.flac")
        voice = Voice(voice_id, name, prompt_text, recording, owner, consent.id, int(time.time()))
        self._write(voice_id, {**asdict(voice), "recording": f"{voice_id}.flac"}, waveform, sampling_rate)
        return voice

    def delete(self, voice_id: str, owner: str) -> None:
        """Deletes a voice. Raises a [`ServiceError`] if there is none, or it belongs to another."""
        if voice_id not in [voice.id for voice in self._get_own(owner)]:
            raise ServiceError(404, f"Voice {voice_id!r} does not exist.", "voice_id", "voice_not_found")
        self._remove(voice_id)

    def delete_consent(self, consent_id: str, owner: str) -> None:
        """Deletes a consent, and with it the voices that were made on it."""
        self.get_consent(consent_id, owner)
        for voice in self._get_own(owner):
            if voice.consent == consent_id:
                self._remove(voice.id)
        self._remove(consent_id)

    def _get_own(self, owner: str) -> list[Voice]:
        """The voices that the owner of a key has made, with any of the libraries of the folder."""
        return [
            Voice(
                **{
                    **description,
                    "recording": self._files.unstrip_protocol(f"{self._folder}/{description['recording']}"),
                }
            )
            for description in self._read_all("voice_")
            if description["owner"] == owner
        ]

    def _read_all(self, start: str) -> list[dict[str, Any]]:
        """The descriptions whose names begin so. The folder is listed anew; what is known of it is not read again."""
        with self._lock:
            # Or what another process has written is not seen.
            self._files.invalidate_cache()
            paths = sorted(self._files.glob(f"{self._folder}/{start}*.json"))
            known = self._descriptions
            for path in [path for path in known if Path(path).name.startswith(start) and path not in paths]:
                del known[path]
            for path in paths:
                if path not in known:
                    try:
                        known[path] = json.loads(self._files.cat_file(path))
                    except FileNotFoundError:
                        # Deleted since the folder was listed.
                        continue
            return [known[path] for path in paths if path in known]

    def _write(self, name: str, description: dict[str, Any], waveform: np.ndarray, sampling_rate: int) -> None:
        if isinstance(self._files, LocalFileSystem):
            Path(self._folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        recording = BytesIO()
        soundfile.write(recording, waveform, sampling_rate, format="FLAC")
        # The description last and in one go, because a voice is there when its description is.
        for suffix, data in ((".flac", recording.getvalue()), (".json", json.dumps(description, indent=2).encode())):
            with self._files.open(f"{self._folder}/{name}{suffix}", "wb", autocommit=False) as file:
                file.write(data)
            file.commit()

    def _remove(self, name: str) -> None:
        for suffix in (".json", ".flac"):
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._folder}/{name}{suffix}")


def get_owner(api_key: str) -> str:
    """Names the owner of a key without giving the key away: empty where no keys are asked for."""
    return hashlib.sha256(api_key.encode()).hexdigest()[:32] if api_key else ""
