"""Decoders of another shape on given latents."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from example_runner import run_example
from transformers_sled.training import (
    CodecModelArguments,
    DecoderTrainer,
    DecoderTrainingArguments,
    LatentSegments,
    create_codec,
    decode_utterances,
    encode_utterances,
    load_source,
)


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
# The golden codec has 75 frames a second.
SMALL = {
    "max_steps": 6,
    "batch_size": 2,
    "segment_seconds": 0.16,
    "warmup_steps": 1,
    "mel_n_ffts": [512, 256],
    "mel_num_bins": [40, 20],
    "discriminator_start_step": 2,
    "adversarial_start_step": 4,
    "discriminator_n_ffts": [256],
    "discriminator_seconds": 0.08,
}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def source():
    return EncodecModel.from_pretrained(GOLDEN / "codec")


@pytest.fixture
def dataset(noise_corpus, source):
    return encode_utterances(decode_utterances(load_source(str(noise_corpus)), "audio", 24_000), source)


@pytest.fixture
def make_trainer(source, dataset, other_shape, tmp_path):
    def make(config=other_shape, **changes):
        torch.manual_seed(0)
        codec = create_codec(CodecModelArguments(config_name=str(config)))
        arguments = DecoderTrainingArguments(**{"output_dir": str(tmp_path / "run"), **SMALL, **changes})
        return DecoderTrainer(codec, source, arguments, dataset, dataset.select(range(2)))

    return make


def test_the_command_trains_a_decoder_and_keeps_the_codebooks(noise_corpus, source, other_shape, tmp_path):
    run_example(
        "tiny_voice/train_decoder.py",
        config_name=other_shape,
        codec=GOLDEN / "codec",
        train_files=noise_corpus,
        train_split_name="train[2:]",
        eval_split_name="train[:2]",
        output_dir=tmp_path,
        **SMALL,
    )
    codec = EncodecModel.from_pretrained(tmp_path / "export")
    assert codec.config.num_filters == source.config.num_filters + 2
    for name, value in source.quantizer.state_dict().items():
        assert torch.equal(codec.quantizer.state_dict()[name], value)
    results = json.loads((tmp_path / "eval.json").read_text())
    assert (results["step"], results["num_samples"]) == (6, 2)
    assert {"spectral_distance", "magnitude_distance", "latent_distance"} < set(results)


def test_latents_and_discriminators_take_turns(make_trainer):
    trainer = make_trainer()
    logs = [trainer.advance() for _ in range(6)]
    for name, steps in (("latent", [0, 2, 4]), ("discriminator", [3, 5]), ("adversarial", [5]), ("mel", range(6))):
        assert [step for step, log in enumerate(logs) if name in log] == list(steps)


def test_what_is_exported_is_the_average(make_trainer, tmp_path):
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.codec.encoder.state_dict().items()}
    assert trainer.train()
    exported, last = (EncodecModel.from_pretrained(tmp_path / "run" / name) for name in ("export", "checkpoint-6"))
    averaged = trainer.average.module.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in exported.decoder.state_dict().items())
    assert any(not torch.equal(value, averaged[name]) for name, value in last.decoder.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in exported.encoder.state_dict().items())


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(make_trainer, tmp_path):
    settings = {"final_learning_rate_ratio": 1.0}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "parts"), max_steps=4, **settings).train()
    parts = make_trainer(output_dir=str(tmp_path / "parts"), **settings)
    parts.train()
    assert parts.average.n_averaged == 6
    for name, module in (("average", whole.average), ("discriminator", whole.discriminator)):
        for key, value in module.state_dict().items():
            torch.testing.assert_close(parts.state[name].state_dict()[key], value)


def test_a_decoder_learns_what_the_latents_say(make_trainer):
    trainer = make_trainer(learning_rate=3e-3, discriminator_start_step=1_000, latent_noise=0.0, batch_size=4)
    losses = [trainer.advance()["mel"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_segments_are_latents_with_the_speech_they_stand_for(dataset, source):
    config = source.config
    hop_length, data = config.hop_length, LatentSegments(dataset, config, 12)
    whole = [data[index] for index in range(len(data))]
    assert [audio.shape[0] for audio, _ in whole] == [hop_length * latents.shape[1] for _, latents in whole]
    with torch.no_grad():
        expected = source.encoder(whole[0][0][None, None])[0]
    # They are kept in half precision.
    torch.testing.assert_close(whole[0][1], expected, atol=1e-2, rtol=1e-2)
    audio, latents, is_judged = data.draw(64, torch.Generator().manual_seed(0))
    starts = set()
    for samples, frames, judged in zip(audio[:, 0], latents, is_judged, strict=True):
        places = []
        for index, (_, values) in enumerate(whole):
            # Beyond the end of a short utterance its last latent goes on.
            values = torch.cat([values, values[:, -1:].expand(-1, max(12 - values.shape[1], 0))], dim=1)
            places += [
                (index, start)
                for start in range(values.shape[1] - 11)
                if torch.equal(values[:, start : start + 12], frames)
            ]
        ((index, start),) = places
        found = whole[index][0][start * hop_length : (start + 12) * hop_length]
        assert torch.equal(samples[: len(found)], found) and not samples[len(found) :].any()
        assert judged[4:].all() and judged[:4].all() == (start == 0)
        starts.add((index, start))
    assert (5, 0) in starts and len(starts) > 20


def test_a_codec_of_another_frame_rate_is_refused(make_trainer, tmp_path):
    config = EncodecConfig.from_pretrained(GOLDEN / "codec")
    config.upsampling_ratios = [*config.upsampling_ratios[:-1], 3 * config.upsampling_ratios[-1]]
    config.save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match="`hop_length` is 320 in the old codec and 960 in the new"):
        make_trainer(config=tmp_path / "config")


def test_segments_shorter_than_what_discriminators_judge_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"`segment_seconds` 0\.1 must be 4 frames longer than"):
        make_trainer(segment_seconds=0.1)
