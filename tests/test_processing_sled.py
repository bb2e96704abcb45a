"""The processor: text and audio to tensors, long text, voices on file, and the errors that bad input gets."""

import io

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, BatchFeature

from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled.text_sled import encode_text


GOLDEN = "tests/fixtures/golden"
TEXT = "The dog barked all night."


@pytest.fixture(scope="module")
def processor():
    return SledProcessor.from_pretrained(f"{GOLDEN}/offline")


@pytest.fixture(scope="module")
def interleaved_processor():
    return SledProcessor.from_pretrained(f"{GOLDEN}/streaming")


@pytest.fixture(scope="module")
def model():
    return SledForSpeechSynthesis.from_pretrained(f"{GOLDEN}/offline", codec=f"{GOLDEN}/codec")


@pytest.fixture(scope="module")
def voice():
    return np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


def ids_of(processor, text):
    return processor(text)["input_ids"][0].tolist()


def test_repository_with_only_tokenizer_files_gets_a_full_processor(processor):
    assert isinstance(AutoProcessor.from_pretrained(f"{GOLDEN}/offline"), SledProcessor)
    assert (processor.sampling_rate, processor.hop_length, processor.max_position_embeddings) == (24_000, 320, 2048)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, SledProcessor)
    assert loaded.to_dict() == processor.to_dict()
    assert ids_of(loaded, TEXT) == ids_of(processor, TEXT)


def test_text_has_start_and_end_tokens_and_is_padded_on_the_models_side(processor, interleaved_processor):
    for one, side in ((processor, 0), (interleaved_processor, -1)):
        inputs = one([TEXT, "Stop."])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert mask[1, side] == 0 and mask[1, -1 - side] == 1 and mask[0].all()
        assert ids[0, 0] == 0 and ids[0, -1] == 2
        assert ids[1][mask[1].bool()].tolist() == ids_of(one, "Stop.")


@pytest.mark.parametrize("token", ["<s>", "</s>", "<pad>", "<unk>", "<mask>"])
def test_control_tokens_in_the_text_are_plain_characters(processor, token):
    ids = ids_of(processor, f"say {token} now")
    assert ids[0] == 0 and ids[-1] == 2
    assert not set(ids[1:-1]) & {0, 1, 2, 3, 760}
    assert processor.tokenizer.decode(ids[1:-1]) == f"say {token} now"


def test_prompt_text_comes_first(processor, voice):
    inputs = processor(TEXT, prompt_text="Two plus two.", prompt_audio=voice, sampling_rate=24_000)
    assert inputs["input_ids"][0].tolist() == ids_of(processor, f"Two plus two. {TEXT}")
    without = processor(TEXT, prompt_audio=voice, sampling_rate=24_000)
    assert without["input_ids"][0].tolist() == ids_of(processor, TEXT)


def test_prompt_audio_is_resampled_mixed_and_completed_to_whole_frames(processor, voice):
    inputs = processor(TEXT, prompt_audio=voice, sampling_rate=16_000)
    assert inputs["prompt_values"].shape == (1, 1, 24_000) and inputs["prompt_values"].dtype == torch.float32
    assert inputs["prompt_values_mask"].shape == (1, 24_000) and inputs["prompt_values_mask"].all()
    odd = processor(TEXT, prompt_audio=voice[:1000], sampling_rate=24_000)
    assert odd["prompt_values"].shape[-1] == 4 * 320 and (odd["prompt_values"][..., 1000:] == 0).all()
    stereo = processor(TEXT, prompt_audio=np.stack([voice, voice]), sampling_rate=24_000)
    torch.testing.assert_close(stereo["prompt_values"][0, 0, :16_000], torch.from_numpy(voice))


def test_audio_may_come_in_many_forms(processor, voice, tmp_path):
    path = tmp_path / "voice.wav"
    soundfile.write(path, voice, 24_000, subtype="FLOAT")
    encoded = io.BytesIO()
    soundfile.write(encoded, voice, 24_000, format="WAV", subtype="FLOAT")
    expected = torch.from_numpy(voice)
    for audio, rate in (
        (voice, 24_000),
        (voice.astype(np.float64), 24_000),
        (torch.from_numpy(voice), 24_000),
        (voice.tolist(), 24_000),
        (path, None),
        (str(path), None),
        ({"array": voice, "sampling_rate": 24_000}, None),
        ({"bytes": encoded.getvalue(), "path": None}, None),
        ({"bytes": None, "path": str(path)}, None),
    ):
        values = processor(TEXT, prompt_audio=audio, sampling_rate=rate)["prompt_values"]
        torch.testing.assert_close(values[0, 0, : len(expected)], expected)
    integers = processor(TEXT, prompt_audio=(voice * 32768).astype(np.int16), sampling_rate=24_000)
    torch.testing.assert_close(integers["prompt_values"][0, 0, : len(expected)], expected, atol=1e-4, rtol=0)


def test_one_prompt_serves_all_rows_or_each_row_has_its_own(processor, model, voice):
    shared = processor([TEXT, "Stop."], prompt_text="Hello.", prompt_audio=voice, sampling_rate=24_000)
    assert shared["prompt_values"].shape[0] == 1
    own = processor(
        [TEXT, "Stop."], prompt_text=["Hello.", "Bye."], prompt_audio=[voice, voice[:8000]], sampling_rate=24_000
    )
    assert own["prompt_values_mask"].sum(dim=1).tolist() == [16_000, 8_000]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = model.generate(**own, generator=generators, max_new_tokens=12, eos_threshold=1.0)
    for row, (text, prompt_text, length) in enumerate(((TEXT, "Hello.", 16_000), ("Stop.", "Bye.", 8_000))):
        single = processor(text, prompt_text=prompt_text, prompt_audio=voice[:length], sampling_rate=24_000)
        generator = torch.Generator().manual_seed(row + 1)
        (alone,) = model.generate(**single, generator=generator, max_new_tokens=12, eos_threshold=1.0)
        torch.testing.assert_close(both[row], alone, atol=1e-4, rtol=0)


def test_latents_encoded_once_equal_the_audio(processor, model, voice, tmp_path):
    inputs = processor(TEXT, prompt_text="Hello.", prompt_audio=voice, sampling_rate=24_000)
    latents = model.encode_prompt(inputs["prompt_values"], inputs["prompt_values_mask"])
    processor.save_voice(tmp_path / "voice.safetensors", "Hello.", **latents)
    loaded = processor.load_voice(tmp_path / "voice.safetensors")
    audio = []
    for given_inputs in (
        inputs,
        processor(TEXT, prompt_text="Hello.", **latents),
        processor(TEXT, **loaded),
    ):
        generator = torch.Generator().manual_seed(0)
        audio += model.generate(**given_inputs, generator=generator, max_new_tokens=12, eos_threshold=1.0)
    torch.testing.assert_close(audio[1], audio[0])
    torch.testing.assert_close(audio[2], audio[0])


def test_training_audio(processor, voice):
    batch = processor(text=[TEXT, "Stop."], audio=[voice, voice[:9_000]], sampling_rate=24_000)
    assert batch["input_values"].shape == (2, 1, 16_000)
    assert batch["padding_mask"].sum(dim=1).tolist() == [16_000, 9_000]
    torch.testing.assert_close(batch["input_values"][1, 0, :9_000], torch.from_numpy(voice[:9_000]))


def test_dtype_does_not_round_audio(processor, voice):
    inputs = processor(TEXT, prompt_audio=voice, sampling_rate=24_000).to(dtype=torch.bfloat16)
    assert isinstance(inputs, BatchFeature) and inputs["prompt_values"].dtype == torch.float32


def test_text_that_fits_is_one_part(processor):
    assert processor.split_text(TEXT) == [TEXT]
    assert (processor(TEXT)["input_ids"] == 0).sum() == 1


def test_long_text_is_split_into_whole_sentences(processor):
    text = " ".join(f"Dr. Smith saw number {index}, and he was glad of it." for index in range(100))
    parts = processor.split_text(text)
    assert "".join(parts) == text and len(parts) > 5
    for before, part in zip(["", *parts], parts, strict=False):
        assert part.rstrip().endswith("it.")
        assert processor.estimate_num_positions(before + part) <= processor.max_position_embeddings
    ids = processor(text)["input_ids"][0].tolist()
    assert ids == [token for part in parts for token in encode_text(processor.tokenizer, part)]


def test_split_of_other_scripts(processor):
    text = "今日は雨です。明日は晴れでしょうか？" * 60
    parts = processor.split_text(text)
    assert "".join(parts) == text and len(parts) > 1


def test_save_audio(processor, tmp_path):
    audio = [torch.linspace(-0.5, 0.5, 2400), np.zeros(100, dtype=np.float32)]
    paths = [tmp_path / "a.wav", str(tmp_path / "b.flac")]
    processor.save_audio(audio, paths)
    for waveform, path in zip(audio, paths, strict=True):
        written, rate = soundfile.read(path, dtype="float32")
        assert rate == 24_000
        np.testing.assert_allclose(written, np.asarray(waveform), atol=1e-4)
    processor.save_audio(audio[0], tmp_path / "c.wav")
    assert soundfile.info(tmp_path / "c.wav").frames == 2400


NAN = np.full(100, np.nan, dtype=np.float32)
SINE = np.sin(np.arange(4_000) / 10).astype(np.float32)
LATENTS = torch.zeros(1, 4, 32)
BAD_CALLS = [
    ("text", dict(text="")),
    ("text", dict(text=" \n")),
    ("text", dict(text=None)),
    ("text", dict(text=5)),
    ("text", dict(text=[])),
    ("text", dict(text=["fine", 3])),
    ("text", dict(text=["fine", ""])),
    ("text", dict(text=b"bytes")),
    ("text", dict(text="half \ud800 pair")),
    ("return_tensors", dict(return_tensors="np")),
    ("prompt_text", dict(prompt_text="alone")),
    ("prompt_text", dict(prompt_text="", prompt_audio=SINE, sampling_rate=24_000)),
    ("prompt_text", dict(prompt_text=["one", "two"], prompt_audio=SINE, sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=NAN, sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=SINE[:0], sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=SINE.reshape(10, 20, 20), sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=np.array(1.0), sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=SINE.astype(complex), sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=SINE > 0, sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=np.array(["a", "b"]), sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=[SINE, SINE], sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=[], sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio="missing.wav")),
    ("prompt_audio", dict(prompt_audio="pyproject.toml")),
    ("prompt_audio", dict(prompt_audio={"bytes": b"not audio"})),
    ("prompt_audio", dict(prompt_audio={"sound": SINE})),
    ("prompt_audio", dict(prompt_audio=object(), sampling_rate=24_000)),
    ("prompt_audio", dict(prompt_audio=SINE[:1], sampling_rate=700_000)),
    ("sampling_rate", dict(prompt_audio=SINE)),
    ("sampling_rate", dict(prompt_audio=SINE, sampling_rate=0)),
    ("sampling_rate", dict(prompt_audio=SINE, sampling_rate=-24_000)),
    ("sampling_rate", dict(prompt_audio=SINE, sampling_rate=24_000.5)),
    ("sampling_rate", dict(prompt_audio=SINE, sampling_rate="fast")),
    ("sampling_rate", dict(prompt_audio=SINE, sampling_rate=10**9)),
    ("sampling_rate", dict(prompt_audio={"array": SINE, "sampling_rate": 16_000}, sampling_rate=24_000)),
    ("audio", dict(audio=SINE, prompt_audio=SINE, sampling_rate=24_000)),
    ("audio", dict(text=["one", "two"], audio=[SINE], sampling_rate=24_000)),
    ("prompt_latents", dict(prompt_latents=LATENTS[0])),
    ("prompt_latents", dict(prompt_latents=LATENTS.expand(2, -1, -1))),
    ("prompt_latents", dict(prompt_latents=LATENTS + float("inf"))),
    ("prompt_latents", dict(prompt_latents=LATENTS.long())),
    ("prompt_latents", dict(prompt_latents=LATENTS.numpy())),
    ("prompt_latents", dict(prompt_latents=LATENTS, prompt_audio=SINE, sampling_rate=24_000)),
    ("prompt_latents_mask", dict(prompt_latents_mask=torch.ones(1, 4))),
    ("prompt_latents_mask", dict(prompt_latents=LATENTS, prompt_latents_mask=torch.ones(1, 3))),
    ("prompt_latents_mask", dict(prompt_latents=LATENTS, prompt_latents_mask=torch.zeros(1, 4))),
]


@pytest.mark.parametrize(("name", "arguments"), BAD_CALLS)
def test_bad_input_is_named(processor, name, arguments):
    with pytest.raises(ValueError, match=f"`{name}") as error:
        processor(**{"text": TEXT, **arguments})
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("input_ids", dict(input_ids=None)),
        ("input_ids", dict(input_ids=torch.ones(5, dtype=torch.long))),
        ("input_ids", dict(input_ids=torch.ones(1, 0, dtype=torch.long))),
        ("input_ids", dict(input_ids=torch.ones(1, 5))),
        ("input_ids", dict(input_ids=torch.tensor([[0, 760, 2]]))),
        ("input_ids", dict(input_ids=torch.tensor([[0, -1, 2]]))),
        ("input_ids", dict(input_ids=torch.full((1, 2048), 5))),
        ("input_ids", dict(attention_mask=torch.zeros(1, 3))),
        ("attention_mask", dict(attention_mask=torch.ones(1, 4))),
        ("prompt_values", dict(prompt_values=torch.zeros(1, 2, 320))),
        ("prompt_values", dict(prompt_values=torch.zeros(1, 1, 0))),
        ("prompt_values", dict(prompt_values=torch.full((1, 1, 320), float("nan")))),
        ("prompt_values", dict(prompt_values=torch.zeros(1, 1, 320), prompt_values_mask=torch.zeros(1, 320))),
        ("prompt_values", dict(prompt_values=torch.zeros(3, 1, 320))),
        ("prompt_values", dict(prompt_values=torch.zeros(1, 1, 320), prompt_latents=LATENTS)),
        ("prompt_values_mask", dict(prompt_values_mask=torch.ones(1, 320))),
        ("prompt_latents", dict(prompt_latents=torch.zeros(1, 4, 31))),
        ("prompt_latents_mask", dict(prompt_latents_mask=torch.ones(1, 4))),
        ("guidance_scale", dict(guidance_scale=-0.1)),
        ("guidance_scale", dict(guidance_scale=float("inf"))),
        ("guidance_scale", dict(guidance_scale=float("nan"))),
        ("guidance_scale", dict(guidance_scale="high")),
        ("temperature", dict(temperature=-1.0)),
        ("temperature", dict(temperature=float("nan"))),
        ("eos_threshold", dict(eos_threshold=1.1)),
        ("eos_threshold", dict(eos_threshold=-0.1)),
        ("max_new_tokens", dict(max_new_tokens=0)),
        ("num_return_sequences", dict(num_return_sequences=0)),
        ("generator", dict(generator=3)),
        ("generator", dict(generator=[torch.Generator(), torch.Generator()])),
        ("streamer", dict(streamer=print)),
        ("model_kwargs", dict(guidence_scale=2.0)),
    ],
)
def test_bad_input_of_generate_is_named(model, name, arguments):
    with pytest.raises(ValueError, match=f"`{name}"):
        model.generate(**{"input_ids": torch.tensor([[0, 5, 2]]), **arguments})


def test_voice_files_that_are_none(processor, tmp_path):
    with pytest.raises(ValueError, match="`path`"):
        processor.load_voice(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="`path`"):
        processor.load_voice("pyproject.toml")
    with pytest.raises(ValueError, match="`path`"):
        processor.load_voice(f"{GOLDEN}/codec/model.safetensors")
    with pytest.raises(ValueError, match="`prompt_latents`"):
        processor.save_voice(tmp_path / "voice.safetensors", "Hello.", LATENTS.expand(2, -1, -1))
    with pytest.raises(ValueError, match="`prompt_text`"):
        processor.save_voice(tmp_path / "voice.safetensors", "", LATENTS)


def test_audio_files_that_cannot_be_written(processor, tmp_path):
    audio = torch.zeros(100)
    with pytest.raises(ValueError, match="`saving_path`"):
        processor.save_audio([audio, audio], tmp_path / "a.wav")
    with pytest.raises(ValueError, match="`saving_path`"):
        processor.save_audio(audio, tmp_path / "a.docx")
    with pytest.raises(ValueError, match="`audio`"):
        processor.save_audio([audio[None]], tmp_path / "a.wav")
    with pytest.raises(ValueError, match="`sampling_rate`"):
        processor.save_audio(audio, tmp_path / "a.wav", sampling_rate=0)


CONTROL_TOKENS = st.sampled_from(["<s>", "</s>", "<pad>", "<mask>", "<unk>"])
TEXTS = st.lists(st.one_of(st.text(max_size=40), CONTROL_TOKENS), max_size=4).map("".join)
NUMBER_TYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "U2"]
SHAPES = st.lists(st.integers(0, 30), max_size=3).map(tuple)
RATES = st.one_of(st.none(), st.integers(-1, 10**6), st.floats(), st.just("24000"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS)
def test_any_text_gives_speech_or_a_named_error(processor, model, text):
    try:
        inputs = processor(text)
    except ValueError as error:
        assert "`text`" in str(error)
        return
    assert not set(inputs["input_ids"][0, 1:-1].tolist()) & {1, 760}
    (audio,) = model.generate(**inputs, max_new_tokens=2)
    assert audio.ndim == 1 and torch.isfinite(audio).all()


@settings(max_examples=100, deadline=None)
@given(dtype=st.sampled_from(NUMBER_TYPES), shape=SHAPES, rate=RATES, seed=st.integers(0, 10))
def test_any_array_gives_a_prompt_or_a_named_error(processor, dtype, shape, rate, seed):
    array = (np.random.default_rng(seed).normal(0, 1, shape)).astype(dtype)
    try:
        values = processor(TEXT, prompt_audio=array, sampling_rate=rate)["prompt_values"]
    except ValueError as error:
        assert "`prompt_audio" in str(error) or "`sampling_rate`" in str(error)
        return
    assert values.shape[-1] % processor.hop_length == 0 and torch.isfinite(values).all()
