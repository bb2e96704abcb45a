"""Audio formats: what is streamed piece by piece is one file that holds all of the speech and nothing that clicks."""

from io import BytesIO

import av
import numpy as np
import pytest
import soundfile

from transformers_sled.server.audio_formats import AUDIO_FORMATS, AudioEncoder


RATE = 24_000
# What the decoder of a format that cannot say so adds in front.
DELAYS = {"mp3": 1105, "aac": 1024}
FORMATS = ["mp3", "opus", "aac", "flac", "wav", "pcm"]


def make_speech(seconds: float = 2.005) -> np.ndarray:
    """A voiced sound whose pitch and loudness change, that starts and ends away from zero."""
    time = np.arange(int(RATE * seconds)) / RATE
    phase = 2 * np.pi * (150 * time + 20 * np.sin(2 * np.pi * time))
    envelope = 0.5 + 0.4 * np.sin(2 * np.pi * 1.3 * time)
    waveform = envelope * sum(np.cos(number * phase) / number for number in range(1, 9)) / 4
    return waveform.astype(np.float32)


def encode(waveform: np.ndarray, audio_format: str, seed: int = 0, **kwargs) -> list[bytes]:
    encoder = AudioEncoder(audio_format, RATE, **kwargs)
    rng = np.random.default_rng(seed)
    pieces, start = [], 0
    while start < len(waveform):
        size = int(rng.integers(1, 6_000))
        pieces.append(encoder.encode(waveform[start : start + size]))
        start += size
    return [*pieces, encoder.finish()]


def decode(data: bytes, audio_format: str, rate: int = RATE) -> np.ndarray:
    """By FFmpeg, at the rate at which it was encoded."""
    settings = AUDIO_FORMATS[audio_format]
    options = {"sample_rate": str(rate), "ch_layout": "mono"} if settings.codec.startswith("pcm_") else {}
    is_raw = audio_format in ("pcm", "mulaw", "alaw")
    with av.open(
        BytesIO(data), format=settings.container if is_raw else None, options=options if is_raw else {}
    ) as file:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frames = [piece for frame in file.decode(audio=0) for piece in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])


@pytest.mark.parametrize("audio_format", FORMATS)
def test_all_of_the_speech_is_there_and_nothing_clicks(audio_format):
    speech = make_speech()
    decoded = decode(b"".join(encode(speech, audio_format)), audio_format)
    if audio_format in DELAYS:
        delay = DELAYS[audio_format]
        assert len(speech) + delay <= len(decoded) <= len(speech) + delay + 2 * 1152
        decoded = decoded[delay : delay + len(speech)]
    assert len(decoded) == len(speech)
    error = decoded - speech
    # 16 bits, or what the codec loses.
    limit = 1e-4 if audio_format in ("flac", "wav", "pcm") else 0.12
    assert np.sqrt(np.mean(error**2)) < limit / 2
    assert np.abs(error).max() < (limit if audio_format in ("flac", "wav", "pcm") else 0.35)
    # A click is a jump that the speech does not have.
    assert np.abs(np.diff(decoded)).max() < 1.5 * np.abs(np.diff(speech)).max()


@pytest.mark.parametrize("audio_format", FORMATS)
def test_it_leaves_as_it_is_made(audio_format):
    speech = make_speech()
    encoder = AudioEncoder(audio_format, RATE)
    pieces = [encoder.encode(speech[start : start + 4_800]) for start in range(0, len(speech) - 4_800, 4_800)]
    assert all(pieces)
    # What is there now holds all but the last half second.
    received = decode(b"".join(pieces), audio_format)
    assert len(received) > len(speech) - RATE // 2
    encoder.finish()


@pytest.mark.parametrize("audio_format", ["opus", "wav", "pcm"])
def test_soundfile_reads_them(audio_format):
    # It does not read a FLAC that does not say how long it is.
    speech = make_speech()
    data = BytesIO(b"".join(encode(speech, audio_format)))
    raw = {"format": "RAW", "samplerate": RATE, "channels": 1, "subtype": "PCM_16", "endian": "LITTLE"}
    samples, rate = soundfile.read(data, **(raw if audio_format == "pcm" else {}))
    assert (len(samples), rate) == (len(speech), RATE)


@pytest.mark.parametrize("audio_format", [*FORMATS, "mulaw", "alaw"])
def test_pieces_of_any_size_give_the_same_file(audio_format):
    speech = make_speech()
    first, second = (b"".join(encode(speech, audio_format, seed)) for seed in (1, 2))
    if audio_format == "opus":
        # Each file draws a serial number, and pages end where the pieces do.
        np.testing.assert_array_equal(decode(first, audio_format), decode(second, audio_format))
    else:
        assert first == second


@pytest.mark.parametrize("audio_format", FORMATS)
def test_silence_and_nothing_are_files(audio_format):
    nothing = b"".join(encode(np.zeros(0, np.float32), audio_format))
    assert bool(nothing) == (audio_format not in ("pcm",))
    one = b"".join(encode(np.zeros(240, np.float32), audio_format))
    assert len(decode(one, audio_format)) >= 240


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("audio_format", ["pcm", "mulaw", "alaw"])
def test_other_sampling_rates(rate, audio_format):
    speech = make_speech()
    decoded = decode(b"".join(encode(speech, audio_format, output_sampling_rate=rate)), audio_format, rate)
    assert abs(len(decoded) - len(speech) * rate / RATE) <= 1
    assert np.sqrt(np.mean(decoded**2)) == pytest.approx(np.sqrt(np.mean(speech**2)), rel=0.05)


def get_pitch(waveform: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(np.fft.rfftfreq(len(waveform), 1 / RATE)[spectrum.argmax()])


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.8, 1.25, 2.0, 4.0])
def test_speed_keeps_the_pitch(speed):
    time = np.arange(RATE * 3) / RATE
    tone = (0.5 * np.sin(2 * np.pi * 220 * time)).astype(np.float32)
    decoded = decode(b"".join(encode(tone, "wav", speed=speed)), "wav")
    assert len(decoded) == pytest.approx(len(tone) / speed, rel=0.05)
    assert get_pitch(decoded) == pytest.approx(220, abs=3)
    assert np.abs(np.diff(decoded)).max() < 1.5 * np.abs(np.diff(tone)).max()


def test_what_is_too_loud_is_clipped():
    loud = 3 * make_speech()
    samples = np.frombuffer(b"".join(encode(loud, "pcm")), "<i2")
    np.testing.assert_allclose(samples, np.clip(loud, -1, 1) * 32767, atol=0.51)
    assert samples.max() == 32767


def test_metadata_is_in_the_file():
    for audio_format in ("mp3", "opus", "aac", "flac", "wav"):
        data = b"".join(encode(make_speech(0.2), audio_format, metadata={"comment": "AI-generated speech"}))
        with av.open(BytesIO(data)) as file:
            known = {**file.metadata, **file.streams[0].metadata}
        assert {name.lower(): value for name, value in known.items()}["comment"] == "AI-generated speech"


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="`audio_format`"):
        AudioEncoder("midi", RATE)
