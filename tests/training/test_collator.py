"""The training collator: batches of waveforms or codes, padded for the model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import EncodecModel

from transformers_sled.codec_sled import encode_codes
from transformers_sled.processing_sled import SledProcessor
from transformers_sled.training import SledDataCollator


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
RATE = 24000
TEXTS = ["Stop.", "The dog barked all night, and she left </s> at once."]
LENGTHS = [9000, 15017]


@pytest.fixture(scope="module", params=["offline", "streaming"])
def processor(request):
    return SledProcessor.from_pretrained(GOLDEN / request.param)


@pytest.fixture(scope="module")
def waveforms():
    return [
        (0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)
        for seed, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def codes(waveforms):
    codec = EncodecModel.from_pretrained(GOLDEN / "codec").eval()
    return encode_codes(codec, [torch.from_numpy(waveform) for waveform in waveforms], 6.0)


def audio_examples(waveforms):
    return [
        {"text": text, "audio": {"array": waveform, "sampling_rate": RATE}}
        for text, waveform in zip(TEXTS, waveforms, strict=True)
    ]


def code_examples(codes):
    return [{"text": text, "audio_codes": row.tolist()} for text, row in zip(TEXTS, codes, strict=True)]


def test_codes(processor, codes):
    batch = SledDataCollator(processor)(code_examples(codes))
    assert set(batch) == {"input_ids", "attention_mask", "audio_codes", "audio_codes_mask", "return_loss"}
    assert batch["return_loss"] is True
    assert batch["audio_codes"].shape == (2, 8, 47)
    assert batch["audio_codes"].dtype == torch.long
    assert batch["audio_codes_mask"].sum(dim=1).tolist() == [29, 47]
    for row, mask, expected in zip(batch["audio_codes"], batch["audio_codes_mask"], codes, strict=True):
        np.testing.assert_array_equal(row[:, mask.bool()], expected)
        assert not row[:, ~mask.bool()].any()


def test_waveforms(processor, waveforms):
    batch = SledDataCollator(processor)(audio_examples(waveforms))
    assert set(batch) == {"input_ids", "attention_mask", "input_values", "padding_mask", "return_loss"}
    assert batch["input_values"].shape == (2, 1, 15017)
    assert batch["padding_mask"].sum(dim=1).tolist() == LENGTHS
    for row, waveform in zip(batch["input_values"], waveforms, strict=True):
        np.testing.assert_array_equal(row[0, : len(waveform)], waveform)


def test_text_is_the_processors_on_the_models_side(processor, waveforms, codes):
    expected = processor(text=TEXTS, return_tensors="pt")
    for examples in (audio_examples(waveforms), code_examples(codes)):
        batch = SledDataCollator(processor)(examples)
        torch.testing.assert_close(batch["input_ids"], expected["input_ids"])
        torch.testing.assert_close(batch["attention_mask"], expected["attention_mask"])
    first_is_padded = not batch["attention_mask"][0, 0]
    assert first_is_padded == (processor.tokenizer.padding_side == "left")


@pytest.mark.parametrize("form", ["path", "bytes", "path_in_mapping", "other_rate"])
def test_audio_in_any_form(processor, waveforms, tmp_path, form):
    path = tmp_path / "audio.wav"
    rate = 48000 if form == "other_rate" else RATE
    soundfile.write(path, np.repeat(waveforms[0], rate // RATE), rate, subtype="FLOAT")
    audio = {"path": str(path), "bytes": path.read_bytes(), "path_in_mapping": {"bytes": None, "path": str(path)}}.get(
        form, str(path)
    )
    batch = SledDataCollator(processor)([{"text": TEXTS[0], "audio": audio}])
    assert batch["input_values"].shape == (1, 1, LENGTHS[0])
    if form != "other_rate":
        np.testing.assert_array_equal(batch["input_values"][0, 0], waveforms[0])


class Decoder:
    """What an audio column of `datasets` gives: a decoder of torchcodec."""

    def __init__(self, samples, sampling_rate):
        self.samples = SimpleNamespace(data=torch.from_numpy(samples)[None], sample_rate=sampling_rate)

    def get_all_samples(self):
        return self.samples


@pytest.mark.parametrize("form", ["int16", "samples_by_channels", "channels_by_samples", "decoder", "rate_and_array"])
def test_audio_follows_the_rules_of_a_prompt(processor, waveforms, form):
    waveform = waveforms[0]
    channels = np.stack([1.5 * waveform, 0.5 * waveform])
    audio = {
        "int16": {"array": (waveform * 32768).round().astype(np.int16), "sampling_rate": RATE},
        "samples_by_channels": {"array": channels.T, "sampling_rate": RATE},
        "channels_by_samples": {"array": channels, "sampling_rate": RATE},
        "decoder": Decoder(waveform, RATE),
        "rate_and_array": (RATE, waveform),
    }[form]
    batch = SledDataCollator(processor)([{"text": TEXTS[0], "audio": audio}])
    assert batch["input_values"].shape == (1, 1, len(waveform))
    np.testing.assert_allclose(batch["input_values"][0, 0], waveform, atol=1e-4 if form == "int16" else 1e-7)
    prompt = processor("More.", prompt_text=TEXTS[0], prompt_audio=[audio])["prompt_values"]
    np.testing.assert_array_equal(prompt[0, 0, : len(waveform)], batch["input_values"][0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "example 'u1' must have a `text`"),
        ({"text": None}, "example 'u1' must have a `text`"),
        ({"audio": None}, "example 'u1' must have `audio`"),
        ({"audio": "nowhere.wav"}, "`audio of example 'u1'` 'nowhere.wav' does not exist"),
        (
            {"audio": {"array": np.full(900, np.nan), "sampling_rate": RATE}},
            "`audio of example 'u1'` has values that are not finite",
        ),
        ({"audio": {"array": np.zeros(0), "sampling_rate": RATE}}, "`audio of example 'u1'` must not be empty"),
    ],
)
@pytest.mark.parametrize("row", [0, 1])
def test_bad_audio_is_named(processor, waveforms, change, message, row):
    examples = audio_examples(waveforms)
    examples[row] |= {"id": "u1", **change}
    with pytest.raises(ValueError, match=message):
        SledDataCollator(processor)(examples)


def test_speech_is_of_one_kind_in_a_batch(processor, waveforms, codes):
    for first, second, missing in ((codes, waveforms, "audio_codes"), (waveforms, codes, "audio")):
        mixed = [
            (audio_examples(waveforms) if speech is waveforms else code_examples(codes))[row]
            for row, speech in enumerate((first, second))
        ]
        with pytest.raises(ValueError, match=f"an example must have `{missing}`"):
            SledDataCollator(processor)(mixed)


@pytest.mark.parametrize("bad", [np.zeros((8, 0), int), np.zeros((4, 9), int), np.zeros(9, int), None])
def test_bad_codes_are_named(processor, codes, bad):
    examples = code_examples(codes)
    examples[1] |= {"id": "u1", "audio_codes": bad}
    with pytest.raises(ValueError, match="example 'u1'"):
        SledDataCollator(processor)(examples)
    with pytest.raises(ValueError, match="`examples`"):
        SledDataCollator(processor)([])
