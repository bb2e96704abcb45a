"""
Clients as their makers ship them, told nothing but another address. They are not among the packages of the tests: install
`livekit-plugins-openai livekit-plugins-deepgram livekit-plugins-elevenlabs "pipecat-ai[openai,deepgram,elevenlabs]"
elevenlabs deepgram-sdk` beside them, and run `pytest -m slow tests/server/test_clients.py`.
"""

import asyncio
import ssl
import subprocess

import numpy as np
import pytest


pytestmark = pytest.mark.slow

TEXT = "The dog barked all night."


def assert_is_speech(samples: np.ndarray, rate: int, seconds=(0.8, 4.0)) -> None:
    """It lasts as long as the text takes, and is loud."""
    assert seconds[0] < len(samples) / rate < seconds[1]
    assert np.sqrt(np.mean((samples / 32768.0) ** 2)) > 0.01


def collect_frames(frames) -> tuple[np.ndarray, int]:
    """Samples of LiveKit's audio frames, and their rate."""
    return np.concatenate([np.frombuffer(frame.data, np.int16) for frame in frames]), frames[0].sample_rate


async def run_livekit(make_tts, is_streamed: bool) -> tuple[np.ndarray, int]:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        tts = make_tts(session)
        frames = []
        if is_streamed:
            async with tts.stream() as stream:
                for word in TEXT.split():
                    stream.push_text(f"{word} ")
                stream.end_input()
                async for event in stream:
                    frames.append(event.frame)
        else:
            async with tts.synthesize(TEXT) as stream:
                async for event in stream:
                    frames.append(event.frame)
        await tts.aclose()
    return collect_frames(frames)


@pytest.mark.parametrize("model", ["gpt-4o-mini-tts", "tts-1"])
@pytest.mark.parametrize("response_format", ["mp3", "pcm", "opus", "wav"])
def test_livekit_openai(service, model, response_format):
    openai = pytest.importorskip("livekit.plugins.openai")

    def make_tts(session):
        return openai.TTS(
            model=model, voice="ash", base_url=f"{service.url}/v1", api_key="unused", response_format=response_format
        )

    assert_is_speech(*asyncio.run(run_livekit(make_tts, is_streamed=False)))


@pytest.mark.parametrize("is_streamed", [True, False])
def test_livekit_deepgram(service_with_keys, is_streamed):
    deepgram = pytest.importorskip("livekit.plugins.deepgram")

    def make_tts(session):
        return deepgram.TTS(base_url=f"{service_with_keys.url}/v1/speak", api_key="first-key", http_session=session)

    assert_is_speech(*asyncio.run(run_livekit(make_tts, is_streamed)))


@pytest.mark.parametrize("is_streamed", [True, False])
def test_livekit_elevenlabs(service_with_keys, is_streamed):
    elevenlabs = pytest.importorskip("livekit.plugins.elevenlabs")

    def make_tts(session):
        return elevenlabs.TTS(
            voice_id="bf_emma", base_url=f"{service_with_keys.url}/v1", api_key="first-key", http_session=session
        )

    assert_is_speech(*asyncio.run(run_livekit(make_tts, is_streamed)))


def run_pipecat(make_service) -> tuple[np.ndarray, int]:
    """What a pipeline with that service says."""
    frames = pytest.importorskip("pipecat.frames.frames")
    from pipecat.tests.utils import SleepFrame, run_test

    async def run() -> list:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            down, _ = await run_test(
                make_service(session),
                frames_to_send=[
                    frames.LLMFullResponseStartFrame(),
                    frames.LLMTextFrame(TEXT),
                    frames.LLMFullResponseEndFrame(),
                    SleepFrame(sleep=15.0),
                ],
            )
            return down

    down = asyncio.run(run())
    errors = [frame for frame in down if isinstance(frame, frames.ErrorFrame)]
    assert not errors
    audio = [frame for frame in down if isinstance(frame, frames.TTSAudioRawFrame)]
    return np.concatenate([np.frombuffer(frame.audio, np.int16) for frame in audio]), audio[0].sample_rate


def test_pipecat_openai(service):
    tts = pytest.importorskip("pipecat.services.openai.tts")
    assert_is_speech(
        *run_pipecat(
            lambda session: tts.OpenAITTSService(api_key="unused", base_url=f"{service.url}/v1", sample_rate=24_000)
        )
    )


@pytest.mark.parametrize("kind", ["DeepgramTTSService", "DeepgramHttpTTSService"])
def test_pipecat_deepgram(service_with_keys, kind):
    tts = pytest.importorskip("pipecat.services.deepgram.tts")

    def make_service(session):
        is_http = kind == "DeepgramHttpTTSService"
        scheme = "http" if is_http else "ws"
        return getattr(tts, kind)(
            api_key="second-key",
            base_url=f"{scheme}://127.0.0.1:{service_with_keys.port}",
            sample_rate=16_000,
            **({"aiohttp_session": session} if is_http else {}),
        )

    assert_is_speech(*run_pipecat(make_service))


def test_pipecat_elevenlabs(service_with_keys):
    tts = pytest.importorskip("pipecat.services.elevenlabs.tts")

    def make_service(session):
        return tts.ElevenLabsTTSService(
            api_key="second-key",
            url=f"ws://127.0.0.1:{service_with_keys.port}",
            sample_rate=24_000,
            settings=tts.ElevenLabsTTSService.Settings(voice="bf_emma"),
        )

    assert_is_speech(*run_pipecat(make_service))


def test_elevenlabs_whole_text(service_with_keys):
    client = pytest.importorskip("elevenlabs.client").ElevenLabs(api_key="first-key", base_url=service_with_keys.url)
    for convert in (client.text_to_speech.convert, client.text_to_speech.stream):
        audio = b"".join(convert("bf_emma", text=TEXT, output_format="pcm_24000"))
        assert_is_speech(np.frombuffer(audio, "<i2"), 24_000)


def test_elevenlabs_as_it_is_written(make_service, tmp_path, monkeypatch):
    """Its client of WebSockets insists on TLS."""
    elevenlabs = pytest.importorskip("elevenlabs.client")
    certificate, private_key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(private_key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert ssl.create_default_context().get_ca_certs()
    with make_service(api_keys=("a-key",), certificate=str(certificate), private_key=str(private_key)) as service:
        client = elevenlabs.ElevenLabs(api_key="a-key", base_url=f"https://localhost:{service.port}")
        words = iter([f"{word} " for word in TEXT.split()])
        pieces = client.text_to_speech.convert_realtime(
            "bf_emma", text=words, model_id="eleven_flash_v2_5", output_format="pcm_24000"
        )
        assert_is_speech(np.frombuffer(b"".join(pieces), "<i2"), 24_000)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_deepgram_own_client(service_with_keys, is_streamed):
    deepgram = pytest.importorskip("deepgram")
    from deepgram.environment import DeepgramClientEnvironment
    from deepgram.speak.v1.types import SpeakV1Text

    websocket_url = f"ws://127.0.0.1:{service_with_keys.port}"
    environment = DeepgramClientEnvironment(
        base=service_with_keys.url, production=websocket_url, agent=websocket_url, agent_rest=service_with_keys.url
    )
    client = deepgram.DeepgramClient(api_key="first-key", environment=environment)
    options = {"model": "aura-2-thalia-en", "encoding": "linear16", "sample_rate": 24_000}
    if is_streamed:
        audio, kinds = b"", []
        with client.speak.v1.connect(**options) as connection:
            for word in TEXT.split():
                connection.send_text(SpeakV1Text(text=f"{word} "))
            connection.send_flush()
            while "Flushed" not in kinds:
                message = connection.recv()
                if isinstance(message, bytes):
                    audio += message
                else:
                    kinds.append(message.type)
            connection.send_clear()
            while "Cleared" not in kinds:
                kinds.append(connection.recv().type)
            connection.send_close()
        assert kinds == ["Metadata", "Flushed", "Cleared"]
    else:
        audio = b"".join(client.speak.v1.audio.generate(text=TEXT, container="none", **options))
    assert_is_speech(np.frombuffer(audio, "<i2"), 24_000)
