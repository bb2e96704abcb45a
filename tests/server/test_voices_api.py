"""Voices that are made over HTTP: on a consent, kept on disk, each for its key alone."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import openai
import pytest
import soundfile
import torch
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def make_recording(seconds=2.0, rate=16_000, audio_format="WAV") -> bytes:
    file = BytesIO()
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(
        file, 0.3 * np.sin(2 * np.pi * 200 * time) * np.sin(2 * np.pi * 3 * time), rate, format=audio_format
    )
    return file.getvalue()


def make_client(service, key="first-key") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0)


def give_consent(client):
    recording = ("consent.wav", make_recording(), "audio/wav")
    return client.audio.voice_consents.create(name="Anna", language="en-US", recording=recording)


def make_voice(client, consent, sample=None, transcript="Two plus two.", name="anna"):
    return client.audio.voices.create(
        name=name,
        consent=consent.id,
        audio_sample=("sample.wav", make_recording() if sample is None else sample, "audio/wav"),
        extra_body={"transcript": transcript},
    )


def list_voices(service, key) -> set[str]:
    with service.client(headers={"authorization": f"Bearer {key}"}) as client:
        return {voice["id"] for voice in client.get("/v1/audio/voices").json()["voices"]}


def test_a_voice_is_made_spoken_in_and_deleted(service_with_keys):
    client = make_client(service_with_keys)
    consent = give_consent(client)
    assert consent.id.startswith("cons_") and consent.object == "audio.voice_consent"
    assert [known.id for known in client.audio.voice_consents.list()] == [consent.id]
    assert client.audio.voice_consents.retrieve(consent.id).name == "Anna"
    voice = make_voice(client, consent)
    assert voice.id.startswith("voice_") and voice.name == "anna" and voice.object == "audio.voice"
    assert voice.id in list_voices(service_with_keys, "first-key")
    spoken = [
        client.audio.speech.create(
            model="tts-1", voice=name, input="No.", response_format="pcm", extra_body={"seed": 1}
        ).content
        for name in ({"id": voice.id}, "anna", "alloy")
    ]
    assert spoken[0] == spoken[1] != spoken[2]
    # Another key neither sees, uses nor deletes any of it.
    other = make_client(service_with_keys, "second-key")
    assert voice.id not in list_voices(service_with_keys, "second-key")
    for name in (voice.id, "anna"):
        with pytest.raises(openai.BadRequestError):
            other.audio.speech.create(model="tts-1", voice=name, input="No.")
    for use in (
        lambda: other.audio.voices.delete(voice.id),
        lambda: other.audio.voice_consents.delete(consent.id),
        lambda: other.audio.voice_consents.retrieve(consent.id),
        lambda: make_voice(other, consent),
    ):
        with pytest.raises(openai.NotFoundError):
            use()
    assert list(other.audio.voice_consents.list()) == []
    assert client.audio.voices.delete(voice.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.audio.voices.delete(voice.id)
    with pytest.raises(openai.BadRequestError):
        client.audio.speech.create(model="tts-1", voice=voice.id, input="No.")
    # Who takes back a consent takes back what was made on it.
    voice = make_voice(client, consent)
    assert client.audio.voice_consents.delete(consent.id).deleted
    assert voice.id not in list_voices(service_with_keys, "first-key")


def test_voices_survive_a_restart(make_service, tmp_path):
    spoken = []
    with make_service(api_keys=("first-key",), voices_folder=tmp_path / "voices") as service:
        client = make_client(service)
        voice = make_voice(client, give_consent(client))
        deleted = make_voice(client, give_consent(client), name="gone")
        client.audio.voices.delete(deleted.id)
        spoken.append(speak(client, voice.id))
    kept = "".join(file.read_text() for file in (tmp_path / "voices").glob("*.json"))
    assert "first-key" not in kept, "Keys must not be written down."
    with make_service(api_keys=("first-key", "second-key"), voices_folder=tmp_path / "voices") as service:
        assert voice.id in list_voices(service, "first-key")
        assert voice.id not in list_voices(service, "second-key") and deleted.id not in list_voices(
            service, "first-key"
        )
        spoken.append(speak(make_client(service), voice.id))
    assert spoken[0] == spoken[1]


def speak(client, voice) -> bytes:
    return client.audio.speech.create(
        model="tts-1", voice=voice, input="No.", response_format="pcm", extra_body={"seed": 1}
    ).content


def make_recognizer(folder, heard: str) -> str:
    """A recognizer that hears one letter all the time, or nothing."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", "a"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=[8] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.bias[letters.index(heard or "<pad>")] = 1e3
    model.save_pretrained(folder)
    return str(folder)


def test_a_recognizer_hears_what_a_sample_says(make_service, tmp_path):
    with make_service(recognizer=make_recognizer(tmp_path / "letter", "a")) as service:
        assert service.client().get("/ready").json()["recognizer"]
        client = make_client(service)
        consent = give_consent(client)
        heard = make_voice(client, consent, transcript=None)
        given = make_voice(client, consent, transcript="Two plus two.", name="other")
        assert (heard.transcript, given.transcript) == ("a", "Two plus two.")
        assert speak(client, heard.id) not in (b"", speak(client, given.id))
    with make_service(recognizer=make_recognizer(tmp_path / "silence", "")) as service:
        client = make_client(service)
        with pytest.raises(openai.BadRequestError, match="No words were heard") as caught:
            make_voice(client, give_consent(client), transcript=None)
        assert caught.value.param == "audio_sample"


@pytest.mark.parametrize("recognizer", ["nobody/nothing", str(GOLDEN / "offline")])
def test_what_is_no_recognizer_ends_the_start(make_service, recognizer):
    with make_service(recognizer=recognizer, is_awaited=False) as service:
        service.wait_until(lambda: not service.service.is_healthy)
        assert service.client().get("/ready").status_code == 503


@pytest.mark.parametrize("audio_format", ["FLAC", "OGG", "MP3"])
def test_samples_of_other_formats(service, audio_format):
    client = make_client(service)
    make_voice(client, give_consent(client), make_recording(audio_format=audio_format))


@pytest.mark.parametrize(
    ("arguments", "status", "param"),
    [
        ({"sample": b"rubbish"}, 400, "audio_sample"),
        ({"sample": b""}, 400, "audio_sample"),
        ({"sample": make_recording(0.2)}, 400, "audio_sample"),
        ({"sample": make_recording(40)}, 400, "audio_sample"),
        ({"sample": b"\x00" * (10 * 2**20 + 1)}, 413, "audio_sample"),
        ({"transcript": " "}, 400, "transcript"),
        ({"transcript": None}, 400, "transcript"),
        ({"name": ""}, 400, "name"),
    ],
)
def test_bad_samples_are_refused(service, arguments, status, param):
    client = make_client(service)
    with pytest.raises(openai.APIStatusError) as caught:
        make_voice(client, give_consent(client), **arguments)
    assert caught.value.status_code == status and caught.value.param == param


def test_no_voice_without_a_consent(service):
    client = make_client(service)
    with pytest.raises(openai.NotFoundError) as caught:
        client.audio.voices.create(
            name="anna",
            consent="cons_123",
            audio_sample=("a.wav", make_recording()),
            extra_body={"transcript": "Two."},
        )
    assert caught.value.code == "consent_not_found"
    with service.client() as http:
        response = http.post("/v1/audio/voices", data={"name": "a"}, files={"audio_sample": make_recording()})
    assert response.status_code == 400
    assert json.loads(response.content)["error"]["param"] in ("consent", "transcript")


def test_a_service_may_make_no_voices(make_service):
    with make_service(cloning=False) as service, service.client() as http:
        for method, path in (
            ("GET", "/v1/audio/voice_consents"),
            ("POST", "/v1/audio/voice_consents"),
            ("POST", "/v1/audio/voices"),
            ("DELETE", "/v1/audio/voices/voice_1"),
        ):
            response = http.request(method, path)
            assert response.status_code == 403 and response.json()["error"]["code"] == "cloning_off"
        assert http.get("/v1/audio/voices").status_code == 200
