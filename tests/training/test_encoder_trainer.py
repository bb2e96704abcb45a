"""Encoders of another shape that learn given latents."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from example_runner import run_example
from transformers_sled.training import (
    CodecModelArguments,
    EncoderTrainer,
    EncoderTrainingArguments,
    create_codec,
    decode_utterances,
    encode_utterances,
    load_source,
)


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
SMALL = {"batch_size": 2, "segment_seconds": 0.16, "warmup_steps": 1, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def codec(other_shape):
    torch.manual_seed(0)
    return create_codec(CodecModelArguments(config_name=str(other_shape)))


@pytest.fixture
def make_trainer(noise_corpus, tmp_path):
    source = EncodecModel.from_pretrained(GOLDEN / "codec")
    dataset = encode_utterances(decode_utterances(load_source(str(noise_corpus)), "audio", 24_000), source)

    def make(codec, **changes):
        arguments = EncoderTrainingArguments(**{"output_dir": str(tmp_path / "run"), **SMALL, **changes})
        return EncoderTrainer(codec, source, arguments, dataset, dataset.select(range(2)))

    return make


def test_the_command_teaches_the_encoder_and_the_rest_stays(noise_corpus, codec, tmp_path):
    codec.save_pretrained(tmp_path / "decoder")
    run_example(
        "tiny_voice/train_encoder.py",
        model_name_or_path=tmp_path / "decoder",
        codec=GOLDEN / "codec",
        train_files=noise_corpus,
        num_eval_samples=2,
        output_dir=tmp_path / "codec",
        max_steps=2,
        **SMALL,
    )
    taught = EncodecModel.from_pretrained(tmp_path / "codec" / "export").state_dict()
    changed = {
        name.split(".")[0] for name, value in codec.state_dict().items() if not torch.equal(taught[name], value)
    }
    assert changed == {"encoder"}
    results = json.loads((tmp_path / "codec" / "eval.json").read_text())
    assert {"step", "latent_distance", "quantization_distance", "decoded_distance"} < set(results)


def test_an_encoder_learns_the_latents(make_trainer, codec):
    trainer = make_trainer(codec, max_steps=60)
    before = trainer.evaluate()
    losses = [trainer.advance()["loss"] for _ in range(60)]
    after = trainer.evaluate()
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert after["latent_distance"] < 0.9 * before["latent_distance"]
    assert after["quantization_distance"] == before["quantization_distance"]


def test_a_run_that_goes_on_keeps_its_encoder_and_takes_the_decoder_of_today(
    make_trainer, codec, other_shape, tmp_path
):
    make_trainer(codec, max_steps=2).train()
    encoder = {name: value.clone() for name, value in codec.encoder.state_dict().items()}
    torch.manual_seed(1)
    today = create_codec(CodecModelArguments(config_name=str(other_shape)))
    decoder = {name: value.clone() for name, value in today.decoder.state_dict().items()}
    make_trainer(today, max_steps=2).train()
    exported = EncodecModel.from_pretrained(tmp_path / "run" / "export")
    assert all(torch.equal(value, encoder[name]) for name, value in exported.encoder.state_dict().items())
    assert all(torch.equal(value, decoder[name]) for name, value in exported.decoder.state_dict().items())


def test_a_codec_of_another_frame_rate_is_refused(make_trainer):
    config = EncodecConfig.from_pretrained(GOLDEN / "codec")
    config.upsampling_ratios = [*config.upsampling_ratios[:-1], 3 * config.upsampling_ratios[-1]]
    with pytest.raises(ValueError, match="`hop_length` is 320 in the old codec and 960 in the new"):
        make_trainer(EncodecModel(config))
