"""Whisper in the evaluation: converted weights, and two ways of running them that have to agree."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("jiwer")

EVALUATION = Path(__file__).parents[1] / "evaluation"
sys.path.insert(0, str(EVALUATION))

import convert_whisper  # noqa: E402
from metrics.speaker_similarity.speaker_encoders import embed, load_speaker_encoder  # noqa: E402
from metrics.word_error_rate.word_error_rate import edit_counts, error_rates  # noqa: E402
from protocols import SpeechDataset  # noqa: E402
from recognizers import SAMPLING_RATE, load_recognizer  # noqa: E402
from summary import encoder_sanity  # noqa: E402


# Folders of CTranslate2 Whisper models (model.bin, config.json, tokenizer.json), separated as PATH is, and a Parquet
# file with the columns text, speaker and audio.
MODELS = [Path(path) for path in os.environ.get("SLED_TEST_WHISPER", "").split(os.pathsep) if path]
CORPUS = os.environ.get("SLED_TEST_CORPUS")
UTTERANCES = 50

needs_whisper = pytest.mark.skipif(
    not MODELS or not CORPUS,
    reason="SLED_TEST_WHISPER (CTranslate2 Whisper folders) and SLED_TEST_CORPUS (a Parquet file) are not set",
)


@pytest.fixture
def tiny_whisper(tmp_path):
    """A tiny random Whisper and the same in the CTranslate2 format, written by CTranslate2's own converter code."""
    pytest.importorskip("ctranslate2")
    from ctranslate2.converters.transformers import WhisperLoader
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>"]
    specials += ["<|startofprev|>", "<|notimestamps|>"]
    vocabulary = {chr(97 + index): index for index in range(26)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51865,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=32,
        num_mel_bins=20,
        max_source_positions=30,
        max_target_positions=12,
        pad_token_id=26,
        bos_token_id=26,
        eos_token_id=26,
        decoder_start_token_id=27,
    )
    model = WhisperForConditionalGeneration(config).eval()
    spec = WhisperLoader().get_model_spec(model)
    spec.register_vocabulary([str(index) for index in range(config.vocab_size)])
    spec.validate()
    folder = tmp_path / "ctranslate2"
    folder.mkdir()
    spec.save(str(folder))
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "lang_ids": [28], "alignment_heads": [[1, 0]]}
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer.save(str(folder / "tokenizer.json"))
    return model, folder


def test_converted_weights_are_the_originals(tiny_whisper, tmp_path):
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    model, folder = tiny_whisper
    convert_whisper.convert(folder, tmp_path / "converted")
    converted = WhisperForConditionalGeneration.from_pretrained(tmp_path / "converted")
    expected = model.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    for name, weight in converted.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert converted.generation_config.lang_to_id == {"<|en|>": 28}
    assert converted.generation_config.task_to_id == {"transcribe": 29, "translate": 30}
    assert converted.generation_config.no_timestamps_token_id == 32
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    assert processor.feature_extractor.feature_size == 20
    assert processor.tokenizer("abc", add_special_tokens=False)["input_ids"] == [0, 1, 2]


def test_conversion_refuses_what_it_cannot_read(tiny_whisper, tmp_path):
    _, folder = tiny_whisper
    with pytest.raises(ValueError, match=r"has no model\.bin"):
        convert_whisper.convert(tmp_path, tmp_path / "converted")
    path = folder / "model.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(ValueError, match="is cut short"):
        convert_whisper.convert(folder, tmp_path / "converted")
    path.write_bytes(b"\x09" + content[1:])
    with pytest.raises(ValueError, match="binary version 9"):
        convert_whisper.convert(folder, tmp_path / "converted")
    path.write_bytes(content.replace(b"WhisperSpec\0", b"WhispurSpec\0", 1))
    with pytest.raises(ValueError, match="holds a WhispurSpec"):
        convert_whisper.convert(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_integer_weights_are_refused():
    variables = {"encoder/conv1/weight": np.zeros((2, 2, 3), dtype=np.int8)}
    with pytest.raises(ValueError, match="only float32 and float16"):
        convert_whisper.to_state_dict(variables)


@pytest.mark.slow
@needs_whisper
@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_pipeline_and_faster_whisper_agree(folder, tmp_path):
    """To within 1 point of word error rate, on the ground truth of 50 utterances."""
    pytest.importorskip("faster_whisper")
    convert_whisper.convert(folder, tmp_path)
    dataset = SpeechDataset(CORPUS, SAMPLING_RATE)
    utterances = dataset.select(1.0, 10.0, progress=False)[0][:UTTERANCES]
    audios = [dataset.read_audio(utterance.row) for utterance in utterances]
    rates = []
    for name in (f"faster-whisper:{folder}", str(tmp_path)):
        recognizer = load_recognizer(name, "en", torch.device("cpu"))
        texts = [text for start in range(0, len(audios), 10) for text in recognizer(audios[start : start + 10])]
        pairs = zip(texts, utterances, strict=True)
        rates.append(error_rates([edit_counts(text, utterance.text) for text, utterance in pairs]))
        print(name, rates[-1])
    first, second = (rate["word_error_rate"] for rate in rates)
    assert abs(first - second) < 1
    assert first < 20


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS, reason="SLED_TEST_CORPUS (a Parquet file) is not set")
def test_speaker_encoder_separates_the_voices():
    pytest.importorskip("resemblyzer")
    dataset = SpeechDataset(CORPUS, 24_000)
    encoder = load_speaker_encoder("resemblyzer")
    utterances, _ = dataset.select(1.0, 10.0, progress=False)
    embeddings = [embed(encoder, dataset.read_audio(utterance.row), 24_000) for utterance in utterances]
    sanity = encoder_sanity(embeddings, [utterance.speaker for utterance in utterances])
    print(sanity)
    assert sanity["equal_error_rate"] < 10
