"""The processor: text and audio to tensors, long text, voices on file, and the errors that bad input gets."""

import copy
import io
import json
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, BatchFeature, pipeline

from test_audio_sled import ANYTHING, RATES
from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled.text_sled import encode_text


GOLDEN = "tests/fixtures/golden"
TEXT = "The dog barked all night."
NAN = np.full(100, np.nan, dtype=np.float32)
SINE = np.sin(np.arange(4_000) / 10).astype(np.float32)
LATENTS = torch.zeros(1, 4, 32)


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


@pytest.mark.parametrize("file_name", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize("kind", ["released", "saved"])
def test_a_missing_file_is_named(processor, tmp_path, kind, file_name):
    folder = shutil.copytree(f"{GOLDEN}/offline", tmp_path / "voice", ignore=shutil.ignore_patterns("*.safetensors"))
    if kind == "saved":
        processor.save_pretrained(folder)
        (folder / "vocab.json").unlink()
    if not (folder / file_name).is_file():
        return
    (folder / file_name).unlink()
    if kind == "saved" and file_name == "config.json":
        assert SledProcessor.from_pretrained(folder)(TEXT).keys() == processor(TEXT).keys()
    else:
        missing = file_name.replace("vocab.json", "tokenizer.json")
        with pytest.raises(ValueError, match=f"it has no {missing}"):
            SledProcessor.from_pretrained(folder)


def test_what_is_not_there_is_not_called_incomplete(tmp_path):
    for name in ("nobody/nothing", str(tmp_path / "nothing")):
        with pytest.raises(OSError):
            SledProcessor.from_pretrained(name, local_files_only=True)


@pytest.mark.parametrize(("field", "value"), [("vocab_size", 700), ("eos_token_id", 5), ("bos_token_id", 7)])
def test_a_tokenizer_that_is_not_the_models_is_named(processor, tmp_path, field, value):
    processor.save_pretrained(tmp_path)
    config = json.loads(Path(GOLDEN, "offline", "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    SledProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=rf"tokenizer that is not its model's.*`{field}`.* {value}"):
        SledProcessor.from_pretrained(tmp_path)


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


def test_prompt_and_training_audio_are_read_by_the_same_rules(processor, voice, tmp_path):
    """What the reader takes is tested where it is; here, that all of it gets there."""
    path = tmp_path / "voice.wav"
    soundfile.write(path, voice, 24_000, subtype="FLOAT")
    expected = torch.from_numpy(voice)
    column = datasets.Dataset.from_dict({"audio": [{"path": str(path)}] * 2})["audio"]
    integers = (voice * 32_768).astype(np.int16)
    for audio, rate, num_rows in (
        (path.read_bytes(), None, 1),
        ((24_000, integers), None, 1),
        ((torch.from_numpy(voice)[None], 24_000), None, 1),
        (np.stack([voice, voice], axis=1), 24_000, 1),
        (list(voice), 24_000, 1),
        (column, None, 2),
        ([(24_000, voice), path], None, 2),
        (np.stack([voice, voice]), 24_000, 2),
    ):
        prompt = processor([TEXT] * 2, prompt_text="Hello.", prompt_audio=audio, sampling_rate=rate)
        assert len(prompt["prompt_values"]) == num_rows
        training = processor(text=[TEXT] * num_rows, audio=audio, sampling_rate=rate)
        for values in (prompt["prompt_values"], training["input_values"]):
            torch.testing.assert_close(values[-1, 0, : len(voice)], expected, atol=4e-5, rtol=0)


def test_text_and_padding_as_elsewhere_in_transformers(processor):
    column = datasets.Dataset.from_dict({"text": [TEXT, "Stop."]})["text"]
    expected = processor([TEXT, "Stop."])
    for text in (column, (TEXT, "Stop."), np.array([TEXT, "Stop."])):
        for options in ({}, {"padding": True, "truncation": False}, {"padding": "longest"}):
            assert torch.equal(processor(text, **options)["input_ids"], expected["input_ids"])
    arrays = processor(column, prompt_audio=SINE, sampling_rate=24_000, return_tensors="np")
    assert {type(value) for value in arrays.values()} == {np.ndarray}
    np.testing.assert_array_equal(arrays["input_ids"], expected["input_ids"].numpy())
    assert arrays.to(dtype=torch.float16)["prompt_values"].dtype == np.float32
    assert torch.equal(processor(TEXT, padding=False)["input_ids"], processor(TEXT)["input_ids"])


def test_a_processor_can_be_pickled(processor, voice):
    processor = copy.deepcopy(processor)
    processor.save_voice(prompt_text="Hello.", prompt_latents=LATENTS, name="anna")
    loaded = pickle.loads(pickle.dumps(processor))
    assert loaded.to_dict() == processor.to_dict() and loaded.voices == ["anna"]
    assert torch.equal(
        loaded(TEXT, voice_preset="anna")["input_ids"], processor(TEXT, voice_preset="anna")["input_ids"]
    )


# Prompts that cannot work.


def speech(seconds, rate=24_000):
    """Bursts of noise, as many a second as speech has syllables."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.1, len(time))
    return (noise * (np.sin(2 * np.pi * 4 * time) > -0.5)).astype(np.float32)


@pytest.mark.parametrize(
    "audio",
    [
        np.zeros(24_000),
        np.full(24_000, 0.3),
        1e-4 * speech(1.0),
        np.zeros((2, 24_000)),
        3 * speech(1.0).astype(np.int16),
    ],
)
def test_prompts_without_sound_are_refused(processor, audio):
    with pytest.raises(ValueError, match="`prompt_audio` has no usable sound: its loudest part is"):
        processor(TEXT, prompt_text="Hello.", prompt_audio=audio, sampling_rate=24_000)
    # Training data may be silent.
    assert processor(text=[TEXT], audio=[audio], sampling_rate=24_000)["input_values"].shape == (1, 1, 24_000)


def test_silence_around_a_prompt_and_channels_of_opposite_phase_are_no_harm(processor):
    sound = speech(1.0)
    padded = np.concatenate([np.zeros(12_000), sound, np.zeros(12_000)]).astype(np.float32)
    for audio in (padded, np.stack([padded, -padded])):
        values = processor(TEXT, prompt_text="Hello.", prompt_audio=audio, sampling_rate=24_000)["prompt_values"]
        np.testing.assert_array_equal(values[0, 0], padded)


def test_a_transcript_that_cannot_belong_to_its_recording(processor, caplog):
    transcript = "The erosive effects of waves on the shoreline."
    frames = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    padded = np.concatenate([speech(0.1), np.zeros(72_000)]).astype(np.float32)
    for prompt in (
        {"prompt_audio": speech(0.1), "sampling_rate": 24_000},
        {"prompt_audio": padded, "sampling_rate": 24_000},
        {"prompt_latents": frames},
    ):
        with pytest.raises(
            ValueError, match=r"`prompt_text` cannot be what `prompt_\w+` says: it has 46 char.* 0\.1\d? s"
        ):
            processor(TEXT, prompt_text=transcript, **prompt)
    assert not caplog.records
    processor(TEXT, prompt_text=transcript, prompt_audio=speech(3.0), sampling_rate=24_000)
    assert not caplog.records
    processor(TEXT, prompt_text="So.", prompt_audio=speech(20.0), sampling_rate=24_000)
    assert "`prompt_text` has 3 characters, but `prompt_audio`" in caplog.text


def test_a_missing_transcript_is_warned_about_where_the_text_cannot_hold_it(processor, caplog):
    processor(f"Once upon a time there was an old house. {TEXT}", prompt_audio=speech(3.0), sampling_rate=24_000)
    assert not caplog.records
    processor("And these are new words.", prompt_audio=speech(3.0), sampling_rate=24_000)
    assert "`prompt_text` is missing" in caplog.text and "24 characters" in caplog.text


def test_a_prompt_that_is_too_long_is_called_that_and_how_far_to_trim_it(processor):
    words = "word " * 120
    for prompt in (
        {"prompt_audio": speech(60.0), "sampling_rate": 24_000},
        {"prompt_latents": torch.ones(1, 4_500, 32)},
    ):
        with pytest.raises(
            ValueError, match=r"`prompt_(audio|latents)` is too long.* 60.0 s \(4500 f.* Trim it"
        ) as error:
            processor(TEXT, prompt_text=words, **prompt)
    limit = float(str(error.value).split()[-4])
    assert 10 < limit < 15
    processor(TEXT, prompt_text=words[:200], prompt_audio=speech(limit), sampling_rate=24_000)


# Voices by name.


@pytest.fixture
def checkpoint(processor, tmp_path):
    processor = copy.deepcopy(processor)
    for name, num_frames in (("anna", 20), ("ben", 30)):
        latents = torch.randn(1, num_frames, 32, generator=torch.Generator().manual_seed(num_frames))
        processor.save_voice(prompt_text=f"I am {name}.", prompt_latents=latents, name=name)
    processor.default_voice = "ben"
    processor.save_pretrained(tmp_path / "voice")
    return tmp_path / "voice"


def test_voices_travel_with_a_checkpoint(checkpoint, tmp_path):
    assert sorted(file.name for file in (checkpoint / "voices").iterdir()) == ["anna.safetensors", "ben.safetensors"]
    for loaded in (SledProcessor.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)):
        assert loaded.voices == ["anna", "ben"] and loaded.default_voice == "ben"
        anna = loaded.load_voice("anna")
        assert anna["prompt_latents"].shape == (1, 20, 32) and anna["prompt_text"] == "I am anna."
    # Saved to where they are, and elsewhere, while files there are in use.
    loaded.save_pretrained(checkpoint)
    loaded.save_pretrained(tmp_path / "again")
    again = SledProcessor.from_pretrained(tmp_path / "again")
    for name in ("anna", "ben"):
        assert torch.equal(again.load_voice(name)["prompt_latents"], loaded.load_voice(name)["prompt_latents"])
    assert torch.equal(anna["prompt_latents"], again.load_voice("anna")["prompt_latents"])
    assert SledProcessor.from_pretrained(checkpoint, default_voice="anna").default_voice == "anna"


def test_a_voice_by_name_is_its_latents_and_its_text(checkpoint):
    processor = SledProcessor.from_pretrained(checkpoint)

    def assert_same(inputs, expected):
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)

    assert_same(processor(TEXT, voice_preset="anna"), processor(TEXT, **processor.load_voice("anna")))
    assert_same(processor(TEXT), processor(TEXT, voice_preset="ben"))
    assert_same(processor([TEXT, "No."], voice_preset=["anna"]), processor([TEXT, "No."], voice_preset="anna"))
    rows = processor([TEXT, "No."], voice_preset=["anna", "ben"])
    assert rows["prompt_latents_mask"].sum(dim=1).tolist() == [20, 30]
    for row, (name, text) in enumerate((("anna", TEXT), ("ben", "No."))):
        alone = processor(text, voice_preset=name)
        assert torch.equal(
            rows["prompt_latents"][row][rows["prompt_latents_mask"][row].bool()], alone["prompt_latents"][0]
        )
        assert rows["input_ids"][row][rows["attention_mask"][row].bool()].tolist() == alone["input_ids"][0].tolist()
    # A prompt of the call's own comes before the default voice, which can be taken away, and training has none.
    own = processor(TEXT, prompt_audio=SINE, sampling_rate=24_000)
    assert (
        "prompt_latents" not in own and own["input_ids"][0].tolist()[1:4] == processor.tokenizer(TEXT).input_ids[1:4]
    )
    assert sorted(processor(text=[TEXT], audio=[SINE], sampling_rate=24_000)) == [
        "attention_mask",
        "input_ids",
        "input_values",
        "padding_mask",
    ]
    processor.default_voice = None
    assert sorted(processor(TEXT)) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("voice_preset", dict(voice_preset="carl")),
        ("voice_preset", dict(voice_preset="")),
        ("voice_preset", dict(voice_preset="../voices/anna")),
        ("voice_preset", dict(voice_preset=5)),
        ("voice_preset", dict(voice_preset=[])),
        ("voice_preset", dict(voice_preset=["anna", "ben"])),
        ("voice_preset", dict(voice_preset=[None])),
        ("voice_preset", dict(text=["a b", "c d"], voice_preset=["anna", "carl"])),
        ("voice_preset", dict(voice_preset="anna", prompt_audio=np.ones(9), sampling_rate=24_000)),
        ("voice_preset", dict(voice_preset="anna", prompt_text="I am.")),
        ("voice_preset", dict(voice_preset="anna", audio=np.ones(9), sampling_rate=24_000)),
        ("prompt_text", dict(prompt_text="I am.")),
    ],
)
def test_voices_that_are_not_there_are_named(checkpoint, name, arguments):
    processor = SledProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=f"`{name}`"):
        processor(**{"text": TEXT, **arguments})


def test_messages_about_voices_list_them(checkpoint, processor):
    loaded = SledProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"`voice_preset` must be one of \['anna', 'ben'\], got 'carl'"):
        loaded(TEXT, voice_preset="carl")
    loaded.default_voice = "carl"
    with pytest.raises(ValueError, match=r"`default_voice` must be one of \['anna', 'ben'\], got 'carl'"):
        loaded(TEXT)
    with pytest.raises(ValueError, match="`voice_preset` must be left out, since this checkpoint has no voices"):
        processor(TEXT, voice_preset="anna")
    with pytest.raises(ValueError, match=r"`path` must be one of the voices \['anna', 'ben'\] or a file.*got 'carl'"):
        loaded.load_voice("carl")
    (checkpoint / "voices" / "anna.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="'anna' cannot be read as a voice"):
        loaded(TEXT, voice_preset="anna")


def test_a_voice_speaks_in_generate_stream_and_pipeline(checkpoint, model):
    processor = SledProcessor.from_pretrained(checkpoint)
    options = {"max_new_tokens": 10, "eos_threshold": 1.0}

    def seeded():
        return torch.Generator().manual_seed(0)

    audio = {}
    for name in ("anna", "ben"):
        (audio[name],) = model.generate(**processor(TEXT, voice_preset=name), generator=seeded(), **options)
        for preset in ({"voice_preset": name}, *([{}] if name == "ben" else [])):
            for text in (TEXT, iter([TEXT[:5], TEXT[5:]])):
                stream = model.stream(text, processor=processor, generator=seeded(), **preset, **options)
                torch.testing.assert_close(torch.cat(list(stream)), audio[name], atol=1e-4, rtol=0)
            pipe = pipeline("text-to-speech", model=model, tokenizer=processor.tokenizer, processor=processor)
            spoken = pipe(TEXT, preprocess_params=preset, generate_kwargs={"generator": seeded(), **options})
            np.testing.assert_allclose(spoken["audio"], audio[name], atol=1e-4)
    assert not torch.allclose(audio["anna"], audio["ben"], atol=1e-3)


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


def test_prompt_text_begins_every_part(processor, voice):
    processor = SledProcessor(processor.feature_extractor, processor.tokenizer, max_part_seconds=2.0)
    texts = [TEXT, f"{TEXT} {TEXT}"]
    inputs = processor(texts, prompt_text="How are  you?", prompt_audio=voice, sampling_rate=24_000)
    prompt_ids = encode_text(processor.tokenizer, "How are you?", add_special_tokens=False)
    assert inputs["num_prompt_tokens"].tolist() == [len(prompt_ids)] * 2
    ids = inputs["input_ids"][1].tolist()
    starts = [index for index, token in enumerate(ids) if token == processor.tokenizer.bos_token_id]
    assert len(starts) > 1
    assert all(ids[start + 1 :][: len(prompt_ids)] == prompt_ids for start in starts)
    assert "num_prompt_tokens" not in processor(texts[0] * 4, prompt_audio=voice, sampling_rate=24_000)


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


def test_save_audio_takes_what_gives_speech(processor, model, tmp_path):
    output = model.generate(**processor([TEXT, "No."]), max_new_tokens=5, return_dict_in_generate=True)
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    (first, second), rate = output.audio, 16_000
    spoken = [{"audio": one.numpy(), "sampling_rate": rate} for one in output.audio]
    for audio, expected_rate in (
        (output, 24_000),
        (output.audio, 24_000),
        (tuple(output.audio), 24_000),
        (spoken, rate),
        ({"audio": [first.numpy(), second.numpy()], "sampling_rate": rate}, rate),
        ([first.tolist(), second.numpy()], 24_000),
        ([first.bfloat16().float(), second.requires_grad_()], 24_000),
    ):
        processor.save_audio(audio, paths)
        for path, waveform in zip(paths, output.audio, strict=True):
            written, written_rate = soundfile.read(path, dtype="float32")
            assert written_rate == expected_rate
            np.testing.assert_allclose(written, waveform.detach().clamp(-1, 1), atol=1e-2)
    for audio in (first, first.tolist(), spoken[0], first[None], (first * 32_767).to(torch.int16)):
        buffer = io.BytesIO()
        processor.save_audio(audio, buffer, format="flac")
        assert soundfile.read(io.BytesIO(buffer.getvalue()))[0].shape == first.shape
    processor.save_audio(spoken[0], paths[0], sampling_rate=rate)
    processor.save_audio(torch.zeros(0), paths[0])
    assert soundfile.info(paths[0]).frames == 0


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
    ("return_tensors", dict(return_tensors="tf")),
    ("return_tensors", dict(return_tensors=None)),
    ("padding", dict(padding="max_length")),
    ("padding", dict(text=["one", "two words"], padding=False)),
    ("truncation", dict(truncation=True)),
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
        ("guidence_scale", dict(guidence_scale=2.0)),
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
    with pytest.raises(ValueError, match="`saving_path`"):
        processor.save_voice(tmp_path / "no" / "voice.safetensors", "Hello.", LATENTS)
    for name in ("", "../anna", "an/na", ".anna", 5):
        with pytest.raises(ValueError, match="`name`"):
            processor.save_voice(prompt_text="Hello.", prompt_latents=LATENTS, name=name)
    with pytest.raises(ValueError, match="`name` or `saving_path` is missing"):
        processor.save_voice(prompt_text="Hello.", prompt_latents=LATENTS)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("saving_path", dict(audio=[SINE, SINE])),
        ("saving_path", dict(audio=[])),
        ("saving_path", dict(saving_path="a.docx")),
        ("saving_path", dict(saving_path="a")),
        ("saving_path", dict(saving_path="a.raw")),
        ("saving_path", dict(saving_path="no/such/a.wav")),
        ("saving_path", dict(saving_path=".")),
        ("saving_path", dict(saving_path=5)),
        ("saving_path", dict(saving_path="a.mp3", sampling_rate=96_000)),
        ("format", dict(saving_path=io.BytesIO())),
        ("format", dict(saving_path=io.BytesIO(), format="docx")),
        ("audio", dict(audio=[SINE[None]])),
        ("audio", dict(audio=NAN)),
        ("audio", dict(audio=None)),
        ("audio", dict(audio={"sound": SINE})),
        ("audio", dict(audio="speech")),
        ("audio", dict(audio=[{"audio": SINE, "sampling_rate": 8_000}, {"audio": SINE, "sampling_rate": 9_000}])),
        ("sampling_rate", dict(sampling_rate=0)),
        ("sampling_rate", dict(audio={"audio": SINE, "sampling_rate": 8_000}, sampling_rate=9_000)),
    ],
)
def test_audio_that_cannot_be_written_is_named(processor, tmp_path, monkeypatch, name, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}`") as error:
        processor.save_audio(**{"audio": SINE, "saving_path": "a.wav", **arguments})
    assert len(str(error.value)) < 600
    assert not (tmp_path / "a.wav").exists()


CONTROL_TOKENS = st.sampled_from(["<s>", "</s>", "<pad>", "<mask>", "<unk>"])
TEXTS = st.lists(st.one_of(st.text(max_size=40), CONTROL_TOKENS), max_size=4).map("".join)


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


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_audio_gives_inputs_or_a_named_error(processor, data):
    check_any_audio(processor, data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_of_many_audios_gives_inputs_or_a_named_error(processor, data):
    check_any_audio(processor, data)


def check_any_audio(processor, data):
    texts = data.draw(st.lists(st.sampled_from([TEXT, "Stop."]), min_size=1, max_size=3))
    audio, rate = data.draw(ANYTHING), data.draw(RATES)
    prompt_text = data.draw(st.one_of(st.none(), TEXTS, st.lists(TEXTS, max_size=3)))
    voice_preset = data.draw(st.sampled_from([None, None, None, "anna", ["anna"]]))
    name = data.draw(st.sampled_from(["prompt_audio", "audio"]))
    arguments = {name: audio, "sampling_rate": rate, "prompt_text": prompt_text, "voice_preset": voice_preset}
    names = [f"`{one}" for one in ("audio", "prompt_audio", "prompt_text", "sampling_rate`", "voice_preset`")]
    try:
        inputs = processor(texts, **arguments)
    except ValueError as error:
        assert any(one in str(error) for one in names) and len(str(error)) < 800, error
        return
    values = inputs.get("prompt_values" if name == "prompt_audio" else "input_values")
    if values is not None:
        assert torch.isfinite(values).all() and len(values) in (1, len(texts))
        assert name == "audio" or values.shape[-1] % processor.hop_length == 0
