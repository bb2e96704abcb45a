"""The reader of audio: what it takes, what it makes of it, what it refuses; and the writer."""

import io
import os
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformers_sled.audio_sled import (
    AudioError,
    cut_silence,
    list_audio,
    measure_duration,
    measure_sound,
    read_audio,
    write_audio,
)


RATE = 24_000
WAVE = np.random.default_rng(0).normal(0, 0.1, 6_000).astype(np.float32)


def encode(samples=WAVE, rate=RATE, format="WAV", subtype="FLOAT"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


class Decoder:
    """What a column of `datasets` decodes to with torchcodec."""

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(WAVE)[None], sample_rate=RATE)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "voice.wav").write_bytes(encode())
    return tmp_path / "voice.wav"


def test_every_kind_that_knows_its_rate(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    (entry,) = os.scandir(path.parent)
    content = encode()
    kinds = {
        "str": str(path),
        "Path": path,
        "DirEntry": entry,
        "home": "~/voice.wav",
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "BytesIO": io.BytesIO(content),
        "open file": path.open("rb"),
        "SoundFile": soundfile.SoundFile(path),
        "(rate, array)": (RATE, WAVE),
        "(tensor, rate)": (torch.from_numpy(WAVE)[None], RATE),
        "(array, numpy rate)": (WAVE, np.int64(RATE)),
        "array item": {"array": WAVE, "sampling_rate": RATE},
        "list item": {"array": WAVE.tolist(), "sampling_rate": RATE},
        "bytes item": {"bytes": content, "path": "gone.wav"},
        "path item": {"bytes": None, "path": str(path)},
        "decoder": Decoder(),
    }
    for kind, audio in kinds.items():
        # Twice: what has been read can be read again.
        for _ in range(2):
            np.testing.assert_array_equal(read_audio(audio), WAVE, err_msg=kind)
        assert list_audio(audio, 3) == [audio], kind
        assert measure_duration(audio) == pytest.approx(0.25), kind


def test_every_kind_that_does_not_know_its_rate():
    kinds = {
        "float32": WAVE,
        "float64": WAVE.astype(np.float64),
        "tensor": torch.from_numpy(WAVE),
        "tensor with gradient": torch.from_numpy(WAVE).requires_grad_(),
        "list of float": WAVE.tolist(),
        "list of float32": list(WAVE),
        "tuple of float": tuple(WAVE.tolist()),
        "big-endian": WAVE.astype(">f4"),
    }
    for kind, audio in kinds.items():
        np.testing.assert_array_equal(read_audio(audio, RATE), WAVE, err_msg=kind)
        with pytest.raises(ValueError, match="`sampling_rate` is missing"):
            read_audio(audio)
    np.testing.assert_array_equal(read_audio(WAVE, torch.tensor(RATE)), WAVE)


@pytest.mark.parametrize("to_samples", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [("int8", 2**7, 8e-3), ("int16", 2**15, 4e-5), ("int32", 2**31, 1e-7), ("float16", 1, 1e-3), ("float64", 1, 0)],
)
def test_numbers_are_scaled_by_their_type(to_samples, dtype, scale, tolerance):
    samples = to_samples((WAVE.astype(np.float64) * scale).astype(dtype))
    np.testing.assert_allclose(read_audio(samples, RATE), WAVE, atol=tolerance, rtol=0)


def test_numbers_of_other_types_and_ranges():
    unsigned = np.round(WAVE * 128 + 128).astype(np.uint8)
    np.testing.assert_allclose(read_audio(unsigned, RATE), WAVE, atol=5e-3)
    np.testing.assert_allclose(read_audio(torch.from_numpy(WAVE).bfloat16(), RATE), WAVE, atol=2e-3)
    integers = np.round(WAVE * 32_768)
    for dtype in ("int32", "int64", "float32", "float64"):
        np.testing.assert_allclose(read_audio(integers.astype(dtype), RATE), WAVE, atol=2e-5, err_msg=dtype)
    # 16-bit values that have been through a filter.
    np.testing.assert_allclose(read_audio(WAVE * 32_768, RATE), WAVE, atol=1e-6)
    np.testing.assert_allclose(read_audio(encode(WAVE * 32_768)), WAVE, atol=1e-6)
    # A recorder that has overshot.
    np.testing.assert_array_equal(read_audio(WAVE * 15, RATE), WAVE * 15)


@pytest.mark.parametrize(
    "samples",
    [WAVE * 100, WAVE * 1e6, (WAVE * 2**23).astype(np.int64), np.array([1e30, -1e30])],
)
def test_levels_that_leave_a_doubt_are_refused(samples):
    with pytest.raises(AudioError, match=r"`audio` has .* up to") as error:
        read_audio(samples, RATE)
    assert error.value.reason == "level is not audio's"


def test_channels_are_averaged_whichever_axis_they_are_on():
    left, right = WAVE, np.roll(WAVE, 100) * 0.5
    expected = (left + right) / 2
    stereo = np.stack([left, right])
    for audio in (stereo, stereo.T, torch.from_numpy(stereo), stereo.tolist(), encode(stereo.T)):
        rate = None if isinstance(audio, bytes) else RATE
        np.testing.assert_allclose(read_audio(audio, rate), expected, atol=1e-7)
    np.testing.assert_array_equal(read_audio(stereo, RATE, channel=1), right)
    np.testing.assert_allclose(read_audio(stereo, RATE, channel=2), expected, atol=1e-7)


def test_channels_of_opposite_phase_do_not_cancel():
    np.testing.assert_array_equal(read_audio(np.stack([WAVE, -0.99 * WAVE]), RATE), WAVE)
    one_of_eight = np.stack([WAVE, *[np.zeros_like(WAVE)] * 7])
    np.testing.assert_allclose(read_audio(one_of_eight, RATE), WAVE / 8, atol=1e-7)


def test_an_offset_is_removed_and_samples_are_else_kept():
    np.testing.assert_array_equal(read_audio(WAVE, RATE), WAVE)
    np.testing.assert_allclose(read_audio(WAVE + 0.2, RATE), WAVE - WAVE.mean(), atol=1e-6)
    assert abs(read_audio(encode(WAVE - 0.3)).mean()) < 1e-6


def test_resampling_keeps_what_the_new_rate_can_hold_and_nothing_else():
    time = np.arange(48_000) / 48_000
    for frequency, gain in ((1_000, 1.0), (10_000, 1.0), (13_500, 0.0), (20_000, 0.0)):
        tone = 0.5 * np.sin(2 * np.pi * frequency * time)
        resampled = read_audio(tone, 48_000, target_rate=24_000)
        assert len(resampled) == 24_000
        # Away from the ends, where the tone starts and stops.
        level = np.sqrt(2 * np.square(resampled[2_000:-2_000]).mean()) / 0.5
        assert level == pytest.approx(gain, abs=1e-4), frequency


def test_a_part_of_a_recording(tmp_path):
    ramp = np.linspace(-0.5, 0.5, RATE, dtype=np.float32)
    part = ramp[6_000:12_000] - ramp[6_000:12_000].mean()
    for audio in (encode(ramp), ramp, soundfile.SoundFile(io.BytesIO(encode(ramp)))):
        rate = RATE if isinstance(audio, np.ndarray) else None
        np.testing.assert_allclose(read_audio(audio, rate, start=0.25, duration=0.25), part, atol=1e-6)
        # Manifests round their times.
        assert len(read_audio(audio, rate, start=0.5, duration=0.52)) == 12_000
        for start, duration in ((0.5, 0.6), (2.0, None), (2.0, 0.1)):
            with pytest.raises(AudioError) as error:
                read_audio(audio, rate, start=start, duration=duration)
            assert error.value.reason == "cut is outside its recording"
    with pytest.raises(ValueError, match="`start`"):
        read_audio(ramp, RATE, start=-1.0)


@pytest.mark.parametrize(("suffix", "codec"), [("m4a", "aac"), ("mp4", "aac"), ("webm", "libopus"), ("aac", "aac")])
def test_what_soundfile_does_not_read(tmp_path, suffix, codec):
    av = pytest.importorskip("av")
    path = tmp_path / f"tone.{suffix}"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000).astype(np.float32)
    with av.open(str(path), "w", format="adts" if suffix == "aac" else None) as container:
        stream = container.add_stream(codec, rate=48_000)
        stream.codec_context.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        resampler = av.AudioResampler(
            format=stream.codec_context.format,
            layout="stereo",
            rate=48_000,
            frame_size=stream.codec_context.frame_size or 1_024,
        )
        for block in [*resampler.resample(frame), *resampler.resample(None)]:
            for packet in stream.encode(block):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    for audio in (path, path.read_bytes(), path.open("rb")):
        heard = read_audio(audio, target_rate=RATE)
        assert len(heard) == pytest.approx(RATE, abs=0.06 * RATE)
        spectrum = np.abs(np.fft.rfft(heard[4_000:20_000]))
        assert spectrum.argmax() * RATE / 16_000 == pytest.approx(440, abs=2)
        assert np.abs(heard[4_000:20_000]).max() == pytest.approx(0.5, abs=0.05)
        assert measure_duration(audio) == pytest.approx(1.0, abs=0.06)
    broken = path.read_bytes()[: path.stat().st_size // 3] if suffix in ("m4a", "mp4") else b"\0\0\0\x20ftypM4A "
    with pytest.raises(AudioError, match="`audio` bytes is of no format that soundfile or PyAV reads, or broken"):
        read_audio(broken)


def test_the_message_says_which_package_would_read_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "voice.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    with pytest.raises(AudioError, match=r"`prompt_audio` '.*voice.m4a'.*M4A.*`pip install av`"):
        read_audio(tmp_path / "voice.m4a", name="prompt_audio")


BAD_AUDIO = {
    "audio is missing": [None, {"path": None}, {"array": None, "bytes": None}],
    "audio file is missing": [
        "nowhere.wav",
        "~/nowhere.wav",
        "~nobody/nowhere.wav",
        Path("nowhere.wav"),
        {"path": "nowhere.wav"},
        ".",
        "",
        "null\0byte.wav",
        "x" * 5_000,
        "https://example.com/voice.wav",
        "s3://bucket/voice.wav",
        "file:///voice.wav",
        "data:audio/wav;base64,UklGRg==",
    ],
    "empty audio": [b"", io.BytesIO(), [], np.zeros(0), np.zeros((2, 0)), encode(WAVE[:0]), {"array": []}, (RATE, [])],
    "audio is not finite": [np.full(10, np.nan), [float("inf")] * 3, encode(np.full(10, np.nan)), np.full(9, 1e300)],
    "unreadable audio": [
        "pyproject.toml",
        b"not audio",
        io.StringIO("text"),
        {"sound": WAVE},
        {},
        object(),
        3,
        0.5,
        True,
        np.array(1.0),
        WAVE > 0,
        WAVE.astype(complex),
        torch.from_numpy(WAVE).cfloat(),
        np.array(["a", "b"]),
        WAVE.astype(np.uint16),
        np.zeros((2, 3, 4)),
        np.zeros((80, 300)),
        [[0.1], [0.1, 0.2]],
        ["a", "b"],
        [None],
        {1, 2},
        iter([0.1]),
        torch.zeros(5, device="meta"),
        torch.zeros(5).to_sparse(),
    ],
}


@pytest.mark.parametrize(
    ("reason", "audio"),
    [(reason, audio) for reason, audios in BAD_AUDIO.items() for audio in audios],
    # Without addresses: the processes of a parallel run have to agree on names.
    ids=lambda value: re.sub(" at 0x.*", "", f"{value!r}")[:30],
)
def test_bad_audio_is_named_and_its_reason_counted(reason, audio):
    with pytest.raises(AudioError, match="`prompt_audio` ") as error:
        read_audio(audio, RATE, name="prompt_audio")
    assert error.value.reason == reason
    message = str(error.value)
    assert len(message) < 500 and "System error" not in message and "Error opening" not in message


def test_a_closed_file_is_named(path):
    for file in (path.open("rb"), soundfile.SoundFile(path)):
        file.close()
        with pytest.raises(AudioError, match=r"`audio` .*cannot be read"):
            read_audio(file)


def test_a_file_without_permission_is_named(path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path.write_bytes(b"x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AudioError, match=r"`audio` .*voice\.wav' cannot be read: Permission denied"):
        read_audio(path)


def test_rates_that_contradict_or_cannot_be():
    for audio in (encode(), (RATE, WAVE), {"array": WAVE, "sampling_rate": RATE}):
        with pytest.raises(ValueError, match="`sampling_rate` is 16000, but `audio` is at 24000 Hz"):
            read_audio(audio, 16_000)
    for rate in (0, -1, 24_000.5, "fast", True, float("nan"), 10**9, 1j, [RATE]):
        with pytest.raises(ValueError, match="`sampling_rate` must be a whole number of Hz"):
            read_audio(WAVE, rate)
    with pytest.raises(ValueError, match=r"`audio\['sampling_rate'\]` must be a whole number of Hz"):
        read_audio((3, WAVE))
    with pytest.raises(AudioError, match="nothing is left") as error:
        read_audio(WAVE[:1], 700_000, target_rate=RATE)
    assert error.value.reason == "empty audio"


def test_one_audio_is_told_from_several(path):
    for audio in (WAVE, WAVE.tolist(), str(path), path, (RATE, WAVE), np.stack([WAVE, WAVE]), {"path": path}):
        assert len(list_audio(audio, 1)) == 1 and len(list_audio(audio, 3)) == 1
    batch = np.stack([WAVE, -WAVE, WAVE])
    for audio in (batch, torch.from_numpy(batch), batch[:, None], list(batch), tuple(batch), [(RATE, WAVE)] * 3):
        assert len(list_audio(audio, 3)) == 3
    np.testing.assert_array_equal(read_audio(list_audio(batch, 3)[1], RATE), -WAVE)
    np.testing.assert_array_equal(read_audio(list_audio(batch[:1, None], 1)[0], RATE), WAVE)
    # Two texts and a stereo recording: the first axis is the batch.
    assert len(list_audio(batch[:2], 2)) == 2 and len(list_audio(batch[:2].T, 2)) == 1
    for audio, num_texts in ((batch[:, None], 2), ([WAVE, WAVE], 3), ([path] * 2, 1), ([], 1), ((), 2)):
        with pytest.raises(ValueError, match="`audio` must be one audio or one for each of the"):
            list_audio(audio, num_texts)


def test_columns_of_datasets(path):
    table = datasets.Dataset.from_dict(
        {
            "path": [str(path)] * 2,
            "item": [{"path": str(path)}] * 2,
            "bytes": [encode()] * 2,
            "array": [WAVE.tolist()] * 2,
            "undecoded": [str(path)] * 2,
        }
    ).cast_column("undecoded", datasets.Audio(decode=False))
    for column in table.column_names:
        for audio in (table[column], table[column][:], table.with_format("numpy")[column]):
            items = list_audio(audio, 2)
            assert len(items) == 2
            for item in items:
                np.testing.assert_array_equal(read_audio(item, RATE), WAVE, err_msg=column)
        with pytest.raises(ValueError, match="`audio` must be one audio or one for each of the 3 texts"):
            list_audio(table[column], 3)


def test_a_column_that_datasets_cannot_decode_is_named(path, monkeypatch):
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
    table = datasets.Dataset.from_dict({"audio": [str(path)]}).cast_column("audio", datasets.Audio(decode=False))
    column = table.cast_column("audio", datasets.Audio())["audio"]
    with pytest.raises(ValueError, match=r"`audio` is a column that `datasets` cannot decode.*decode=False"):
        list_audio(column, 1)


def test_sound_is_measured_without_the_silence_around_it():
    tone = 0.1 * np.sin(np.arange(RATE))
    padded = np.concatenate([np.zeros(RATE), tone, np.zeros(RATE)]).astype(np.float32)
    seconds, level = measure_sound(padded, RATE)
    assert seconds == pytest.approx(1.0, abs=0.05) and level == pytest.approx(0.1 / np.sqrt(2), rel=0.02)
    assert measure_sound(np.zeros(100, dtype=np.float32), RATE) == (0.0, 0.0)
    assert measure_sound(WAVE[:1], RATE)[0] > 0


def test_silence_at_the_end_is_cut_and_no_sound():
    padded = np.pad(WAVE, (RATE, RATE))
    cut = cut_silence(padded, RATE, 0.15)
    assert len(cut) == pytest.approx(RATE + len(WAVE) + 0.15 * RATE, abs=0.02 * RATE)
    np.testing.assert_array_equal(cut, padded[: len(cut)])
    for kept in (WAVE, np.pad(WAVE, (0, 2_400)), np.zeros(100, dtype=np.float32), WAVE[:1]):
        np.testing.assert_array_equal(cut_silence(kept, RATE, 0.15), kept)


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_what_is_written_can_be_read(tmp_path, format):
    tone = 0.5 * np.sin(np.arange(RATE) / 10).astype(np.float32)
    buffer = io.BytesIO()
    write_audio([tone, torch.from_numpy(tone)], [tmp_path / f"a.{format}", buffer], RATE, format=format)
    for audio in (tmp_path / f"a.{format}", buffer):
        assert read_audio(audio).shape[0] == pytest.approx(RATE, abs=2_400)
    np.testing.assert_allclose(read_audio(tmp_path / f"a.{format}")[:RATE], tone, atol=0.05)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_audio_is_read_or_named(data):
    check_any_audio(data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_of_many_audios_is_read_or_named(data):
    check_any_audio(data)


NUMBER_TYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "bool",
    "complex64",
]
RATES = st.one_of(st.none(), st.just(RATE), st.integers(-1, 10**6), st.floats(), st.just("24000"), st.booleans())
LEVELS = st.sampled_from([0.0, 1e-9, 1e-4, 0.1, 1.0, 30.0, 3e4, 1e9, float("nan"), float("inf")])


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 40), max_size=3).map(tuple))
    samples = np.random.default_rng(draw(st.integers(0, 10))).normal(0, 1, shape) * draw(LEVELS) + draw(LEVELS)
    with np.errstate(all="ignore"):
        samples = samples.astype(draw(st.sampled_from(NUMBER_TYPES)))
    samples = np.asarray(samples)
    kinds = [np.asarray, torch.as_tensor, lambda array: array.tolist(), *([list] if samples.ndim else [])]
    return draw(st.sampled_from(kinds))(samples)


@st.composite
def files(draw):
    format, subtype = draw(
        st.sampled_from(
            [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_U8"), ("FLAC", "PCM_24"), ("OGG", "VORBIS")]
        )
    )
    shape = draw(st.sampled_from([(0,), (1,), (500,), (300, 2), (200, 6)]))
    content = encode(
        np.random.default_rng(0).normal(0, 0.1, shape), draw(st.sampled_from([8_000, RATE, 44_100])), format, subtype
    )
    content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    position = draw(st.integers(0, max(len(content) - 1, 0)))
    if draw(st.booleans()):
        content = content[:position] + draw(st.binary(max_size=4)) + content[position + 4 :]
    return draw(st.sampled_from([bytes, bytearray, io.BytesIO, lambda content: {"bytes": content}]))(content)


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.complex_numbers(),
        st.text(max_size=20),
        st.binary(max_size=50),
        arrays(),
        files(),
    ),
    lambda one: st.one_of(
        st.lists(one, max_size=3),
        st.tuples(one, one),
        st.tuples(RATES, one),
        st.dictionaries(st.sampled_from(["array", "bytes", "path", "sampling_rate", "x"]), one, max_size=3),
    ),
    max_leaves=6,
)


def check_any_audio(data):
    audio, rate, num_texts = data.draw(ANYTHING), data.draw(RATES), data.draw(st.integers(1, 3))
    target_rate = data.draw(st.sampled_from([None, 8_000, RATE]))
    try:
        for item in list_audio(audio, num_texts, "audio"):
            waveform = read_audio(item, rate, target_rate)
            assert waveform.dtype == np.float32 and waveform.ndim == 1 and len(waveform) > 0
            assert np.isfinite(waveform).all()
            assert measure_duration(item, rate) > 0
    except ValueError as error:
        assert "`audio" in str(error) or "`sampling_rate`" in str(error), error
        assert len(str(error)) < 700
