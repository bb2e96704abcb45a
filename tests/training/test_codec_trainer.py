"""Training of a codec: quantizer, losses, and the trainer from parquet to an exported `EncodecModel`."""

import contextlib
import dataclasses
import io
import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import EncodecConfig, EncodecFeatureExtractor, EncodecModel

from example_runner import EXAMPLES, run_example
from transformers_sled.audio_sled import read_audio
from transformers_sled.training import (
    CodecDataArguments,
    CodecModelArguments,
    CodecTrainer,
    CodecTrainingArguments,
    SpeechSegments,
    create_codec,
    decode_utterances,
    load_codec_data,
    load_source,
    resynthesize,
)
from transformers_sled.training.codec_losses import (
    GradientBalancer,
    MelLoss,
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    whitening_loss,
)
from transformers_sled.training.codec_quantizer import initialize_codebooks, quantize, update_codebook


TESTS = Path(__file__).parents[1]
UTTERANCES = TESTS / "fixtures" / "utterances.parquet"
RATE = 24_000


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def config():
    return EncodecConfig(
        upsampling_ratios=[5, 5, 4, 8],
        num_filters=2,
        hidden_size=4,
        num_lstm_layers=1,
        codebook_size=16,
        target_bandwidths=[0.36],
        pad_mode="constant",
    )


@pytest.fixture
def config_path(config, tmp_path):
    config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def corpus(tmp_path):
    """Ten utterances of a gliding tone, as WAV bytes in parquet; the first at another rate and in stereo."""
    rows = []
    for index in range(10):
        rate = 16_000 if index == 0 else RATE
        time = np.arange(int((0.3 + 0.05 * index) * rate)) / rate
        samples = 0.5 * np.sin(2 * np.pi * (200 + 40 * index) * time * (1 + time))
        if index == 0:
            samples = np.stack([samples, samples], axis=1)
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, rate, format="WAV")
        rows.append({"audio": {"bytes": buffer.getvalue(), "path": None}, "text": f"tone {index}"})
    path = tmp_path / "corpus.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


# Short segments and few, small spectra.
SMALL = {
    "segment_seconds": 0.2,
    "batch_size": 4,
    "warmup_steps": 1,
    "kmeans_vectors": 64,
    "logging_steps": 1,
    "mel_n_ffts": [512, 256],
    "mel_num_bins": [40, 20],
    "discriminator_n_ffts": [256],
    "discriminator_filters": 2,
}


@pytest.fixture
def dataset(corpus):
    return decode_utterances(load_source(str(corpus)), "audio", RATE)


def make_trainer(codec, dataset, output_dir, **settings):
    torch.manual_seed(0)
    codec = create_codec(
        CodecModelArguments(**{"model_name_or_path" if codec.name == "export" else "config_name": str(codec)})
    )
    arguments = CodecTrainingArguments(str(output_dir), **{**SMALL, **settings})
    return CodecTrainer(codec, arguments, dataset.select(range(2, len(dataset))), dataset.select(range(2)))


def random_quantizer(config, seed=0):
    quantizer = EncodecModel(config).quantizer
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(512, config.hidden_size, generator=generator)
    initialize_codebooks(quantizer, latents, 64, 10, generator)
    return quantizer, latents


# Configuration


def test_tiny_voice_configuration_has_the_frames_and_codebooks_it_promises():
    config = EncodecConfig.from_pretrained(EXAMPLES / "tiny_voice" / "codec_config.json")
    assert config.sampling_rate % config.hop_length == 0
    assert config.frame_rate == 30
    assert config.num_quantizers == 8
    assert config.hidden_size <= 64


def test_tiny_voice_codec_resynthesizes_speech():
    codec = EncodecModel.from_pretrained(EXAMPLES / "tiny_voice" / "codec")
    assert (
        codec.config.upsampling_ratios
        == EncodecConfig.from_pretrained(EXAMPLES / "tiny_voice" / "codec_config.json").upsampling_ratios
    )
    mel_loss = MelLoss(RATE, [2048, 1024, 512, 256], [160, 100, 64, 32])
    for row in load_source(str(UTTERANCES)):
        audio = torch.from_numpy(read_audio(row["audio"], target_rate=RATE))
        resynthesis, latents = resynthesize(codec, audio)
        assert latents.shape == (-(-len(audio) // 800), 32)
        # In nepers; silence is at 1.7.
        assert mel_loss(resynthesis[None, None], audio[None, None])[0] < 0.5


def test_frames_that_do_not_divide_the_rate_are_refused(tmp_path, config):
    config.upsampling_ratios = [8, 5, 4, 4]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="upsampling_ratios"):
        create_codec(CodecModelArguments(config_name=str(tmp_path)))


# Quantizer


def test_every_codebook_of_the_first_fit_lowers_the_error(config):
    quantizer, latents = random_quantizer(config)
    assert len(quantizer.layers) == 3
    codes = quantizer.encode(latents.T[None])
    errors = [float((quantizer.decode(codes[:n]) - latents.T).square().mean()) for n in (1, 2, 3)]
    assert 1.0 > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.3


def test_training_quantizes_as_transformers_does(config):
    quantizer, latents = random_quantizer(config)
    latents = latents.view(8, 64, -1).transpose(1, 2)
    expected = quantizer.decode(quantizer.encode(latents))
    quantized, commitment, _ = quantize(quantizer, latents, decay=0.99, dead_code_threshold=0.0)
    torch.testing.assert_close(quantized, expected)
    assert commitment > 0


def test_gradients_pass_straight_through_the_quantizer(config):
    quantizer, latents = random_quantizer(config)
    latents = latents.T[None].clone().requires_grad_()
    quantized, _, _ = quantize(quantizer, latents, decay=0.99, dead_code_threshold=0.1)
    weights = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad((quantized * weights).sum(), [latents])
    torch.testing.assert_close(gradient, weights)


def test_commitment_pulls_latents_to_their_codes(config):
    quantizer, latents = random_quantizer(config)
    latents = latents.T[None].clone().requires_grad_()
    codes = quantizer.decode(quantizer.encode(latents)).detach()
    _, commitment, _ = quantize(quantizer, latents, decay=0.99, dead_code_threshold=0.0)
    (gradient,) = torch.autograd.grad(commitment, [latents])
    moved = latents.detach() - 10.0 * gradient
    assert (moved - codes).square().mean() < (latents.detach() - codes).square().mean()


def test_codes_converge_to_the_means_of_their_vectors(config):
    quantizer, _ = random_quantizer(config)
    codebook = quantizer.layers[0].codebook
    vectors = torch.randn(256, config.hidden_size)
    indices = torch.arange(256) % config.codebook_size
    for _ in range(200):
        update_codebook(codebook, vectors, indices, decay=0.9, dead_code_threshold=0.1)
    means = torch.stack([vectors[indices == code].mean(dim=0) for code in range(config.codebook_size)])
    torch.testing.assert_close(codebook.embed, means, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codebook.cluster_size, torch.full((config.codebook_size,), 16.0))


def test_dead_codes_become_vectors_of_the_batch(config):
    quantizer, _ = random_quantizer(config)
    codebook = quantizer.layers[0].codebook
    codebook.embed[3] = codebook.embed_avg[3] = 1000.0
    codebook.cluster_size[3] = 0.0
    vectors = torch.randn(256, config.hidden_size)
    indices = codebook.quantize(vectors)
    assert 3 not in indices
    replaced = update_codebook(codebook, vectors, indices, decay=0.99, dead_code_threshold=0.05)
    assert replaced >= 1
    assert (vectors - codebook.embed[3]).abs().sum(dim=1).min() < 1e-5


def test_too_few_vectors_for_the_codebooks_are_refused(config):
    quantizer = EncodecModel(config).quantizer
    with pytest.raises(ValueError, match="16 codes"):
        initialize_codebooks(quantizer, torch.randn(15, 4), 64, 1, torch.Generator())


# Losses


def test_mel_loss_hears_level_and_pitch_alike():
    loss = MelLoss(RATE, [1024, 256], [64, 20])
    time = torch.arange(RATE) / RATE
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * time)[None, None]
    other = 0.3 * torch.sin(2 * torch.pi * 880 * time)[None, None]
    assert loss(tone, tone)[0] == 0
    assert 0 < loss(tone, 0.5 * tone)[0] < np.log(2.0)
    assert loss(tone, other)[0] > loss(tone, 0.9 * tone)[0]


def test_magnitude_distance_minds_the_loud():
    loss = MelLoss(RATE, [1024, 256], [64, 20])
    time = torch.arange(RATE) / RATE
    loud = 0.3 * torch.sin(2 * torch.pi * 440 * time)[None, None]
    quiet = 0.003 * torch.sin(2 * torch.pi * 1760 * time)[None, None]
    both = loud + quiet
    assert loss(both, both)[1] == 0
    torch.testing.assert_close(loss(0.9 * both, both)[1], torch.tensor(0.1), atol=2e-3, rtol=0)
    assert 10 * loss(loud, both)[1] < loss(quiet, both)[1]
    assert 10 * loss(loud, both)[0] > loss(quiet, both)[0]


def test_mel_loss_needs_bins_for_each_window():
    with pytest.raises(ValueError, match="mel_num_bins"):
        MelLoss(RATE, [1024, 256], [64])


def test_whitening_wants_uncorrelated_dimensions_of_unit_variance():
    white = torch.randn(4, 8, 1000, generator=torch.Generator().manual_seed(0))
    same = white[:, :1].expand(4, 8, 1000)
    assert whitening_loss(white) < 0.05
    assert whitening_loss(same) == pytest.approx(7.0, rel=0.2)
    assert whitening_loss(white + 1.0) == pytest.approx(1.0, rel=0.2)
    assert whitening_loss(0.01 * white) == pytest.approx(1.0, rel=0.2)


def test_balancer_makes_weights_the_shares_whatever_the_scale():
    audio = torch.zeros(2, 1, 100, requires_grad=True)
    first, second = torch.randn(100), torch.randn(100)
    shares = []
    for scale in (1.0, 1e4):
        losses = {"a": (audio * first).sum() * scale, "b": (audio * second).sum()}
        shares.append(GradientBalancer().gradient(losses, {"a": 3.0, "b": 1.0}, audio))
    torch.testing.assert_close(shares[0], shares[1])
    expected = 0.75 * first / first.norm() + 0.25 * second / second.norm()
    torch.testing.assert_close(shares[0], expected.expand(2, 1, 100))


def test_discriminator_learns_to_tell_noise_from_tones():
    torch.manual_seed(0)
    discriminator = MultiScaleSTFTDiscriminator([256, 128], 4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    time = torch.arange(4000) / RATE
    tones = torch.stack([torch.sin(2 * torch.pi * pitch * time) for pitch in (200, 300, 400, 500)])[:, None] * 0.3
    for _ in range(30):
        noise = 0.3 * torch.randn_like(tones)
        loss = discriminator_loss(discriminator(tones), discriminator(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    real, fake = discriminator(tones), discriminator(0.3 * torch.randn_like(tones))
    assert adversarial_loss(fake) > adversarial_loss(real)
    assert feature_matching_loss(real, real) == 0
    assert feature_matching_loss(real, fake) > 0.1


# Data


def test_audio_is_decoded_resampled_and_mixed_once(corpus, dataset):
    data = SpeechSegments(dataset, 2400)
    assert len(data) == 10
    assert [len(data[index]) for index in range(3)] == [int(0.3 * RATE), int(0.35 * RATE), int(0.4 * RATE)]
    assert 0.49 < float(data[5].abs().max()) < 0.51
    (cache,) = dataset.cache_files
    written = os.stat(cache["filename"]).st_mtime_ns
    again = decode_utterances(load_source(str(corpus)), "audio", RATE)
    assert again.cache_files == [cache] and os.stat(cache["filename"]).st_mtime_ns == written
    assert decode_utterances(load_source(str(corpus)), "audio", 16_000).cache_files != [cache]


def test_segments_are_pieces_of_utterances(dataset):
    segments, rows, starts = SpeechSegments(dataset, 2400).draw(16, torch.Generator().manual_seed(0))
    assert segments.shape == (16, 1, 2400)
    data = SpeechSegments(dataset, RATE)
    for segment, row, start in zip(segments, rows, starts, strict=True):
        torch.testing.assert_close(segment[0], data[row][start : start + 2400], rtol=0, atol=0)
    long, _, starts = data.draw(4, torch.Generator().manual_seed(0))
    assert (long[:, :, -2400:] == 0).all() and (starts == 0).all()


def test_every_second_of_audio_is_as_likely_as_any_other(dataset):
    _, rows, _ = SpeechSegments(dataset, 2400).draw(4000, torch.Generator().manual_seed(0))
    expected = np.array(dataset["length"][:]) / sum(dataset["length"][:])
    np.testing.assert_allclose(np.bincount(rows, minlength=10) / 4000, expected, atol=0.03)


def test_unusable_data_arguments_are_refused(corpus):
    for arguments, message in (
        ({}, r"dataset_name.*train_files"),
        ({"train_files": "missing-*.parquet"}, r"'missing-\*\.parquet' matches no file"),
        ({"train_files": str(corpus), "audio_column_name": "speech"}, "audio_column_name"),
        ({"train_files": str(corpus), "num_eval_samples": 10}, "num_eval_samples"),
    ):
        with pytest.raises(ValueError, match=message):
            load_codec_data(CodecDataArguments(**arguments), RATE, 0)


def test_what_is_evaluated_on_is_not_trained_on(corpus):
    train, evaluation = load_codec_data(CodecDataArguments(train_files=str(corpus), num_eval_samples=3), RATE, 0)
    held_out, seen = set(evaluation["length"][:]), set(train["length"][:])
    assert len(held_out) == 3 and not held_out & seen
    files = CodecDataArguments(train_files=str(corpus), eval_files=str(corpus), num_eval_samples=4)
    train, evaluation = load_codec_data(files, RATE, 0)
    assert (len(train), len(evaluation)) == (10, 4)


# The trainer


def test_the_command_runs_all_phases_and_exports_an_encodec(corpus, tmp_path, config_path, config):
    output_dir = tmp_path / "run"
    settings = {
        **SMALL, "train_files": corpus, "config_name": config_path, "output_dir": output_dir, "num_eval_samples": 2,
        "max_steps": 6, "quantizer_start_step": 2, "discriminator_start_step": 3, "adversarial_start_step": 4,
        "discriminator_update_probability": 1.0, "eval_steps": 3, "save_steps": 2, "waveform_weight": 0.1,
        "magnitude_weight": 0.5, "bf16": True,
    }  # fmt: skip
    run_example("train_codec.py", **settings)
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    codec = EncodecModel.from_pretrained(output_dir / "export").eval()
    extractor = EncodecFeatureExtractor.from_pretrained(output_dir / "export")
    assert codec.config.upsampling_ratios == config.upsampling_ratios
    assert all(layer.codebook.embed.any() for layer in codec.quantizer.layers)
    inputs = extractor(np.zeros(1600, dtype=np.float32), sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        codes = codec.encode(**inputs).audio_codes
        assert codes.shape == (1, 1, 3, 2)
        assert codec(**inputs).audio_values.shape == (1, 1, 1600)
    results = json.loads((output_dir / "eval.json").read_text())
    assert results["step"] == 6
    assert results["num_samples"] == 2
    assert len(results["latent_std"]) == config.hidden_size


def test_an_interrupted_run_ends_as_an_uninterrupted_one(dataset, tmp_path, config_path, monkeypatch):
    settings = {
        "max_steps": 6, "quantizer_start_step": 1, "discriminator_start_step": 2, "adversarial_start_step": 3,
        "eval_steps": 100, "save_steps": 100,
    }  # fmt: skip
    assert make_trainer(config_path, dataset, tmp_path / "whole", **settings).train()

    train_step = CodecTrainer.train_step

    def interrupted(trainer):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return train_step(trainer)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(CodecTrainer, "train_step", interrupted)
        assert not make_trainer(config_path, dataset, tmp_path / "halves", **settings).train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in (tmp_path / "halves").glob("checkpoint-*")] == ["checkpoint-3"]
    assert make_trainer(config_path, dataset, tmp_path / "halves", **settings).train()

    whole, halves = (
        EncodecModel.from_pretrained(tmp_path / name / "export").state_dict() for name in ("whole", "halves")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, msg=name)


def test_a_frozen_encoder_leaves_codes_as_they_are(dataset, tmp_path, config_path):
    settings = {"max_steps": 3, "quantizer_start_step": 1, "eval_steps": 100, "save_steps": 100}
    make_trainer(config_path, dataset, tmp_path / "run", **settings).train()
    exported = tmp_path / "run" / "export"
    make_trainer(exported, dataset, tmp_path / "decoder", **settings, freeze_encoder=True).train()
    before = EncodecModel.from_pretrained(exported).state_dict()
    after = EncodecModel.from_pretrained(tmp_path / "decoder" / "export").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_freezing_needs_trained_codebooks(config):
    with pytest.raises(ValueError, match="freeze_encoder"):
        CodecTrainer(EncodecModel(config), CodecTrainingArguments("unused", freeze_encoder=True))


def test_latent_loss_needs_a_frozen_encoder():
    with pytest.raises(ValueError, match=r"latent_weight.*freeze_encoder"):
        CodecTrainingArguments("unused", latent_weight=1.0)


def test_latent_loss_alone_teaches_the_decoder_what_the_encoder_heard(dataset, config, tmp_path):
    config.num_filters = 4
    config.save_pretrained(tmp_path / "config")
    torch.manual_seed(0)
    codec = create_codec(CodecModelArguments(config_name=str(tmp_path / "config")))
    arguments = CodecTrainingArguments(
        output_dir="unused", segment_seconds=0.2, quantizer_start_step=0, kmeans_vectors=400, batch_size=4,
        learning_rate=3e-3, warmup_steps=1, latent_noise=0.0, mel_weight=0.0, latent_weight=1.0, freeze_encoder=True,
    )  # fmt: skip
    audio, _, _ = SpeechSegments(dataset, 4800).draw(8, torch.Generator())
    with torch.no_grad():
        codec.encoder.layers[-1].conv.weight *= 1.0 / codec.encoder(audio).std()
    unfrozen = dataclasses.replace(arguments, latent_weight=0.0, freeze_encoder=False)
    CodecTrainer(codec, unfrozen, dataset).start_quantizer()
    trainer = CodecTrainer(codec, arguments, dataset, dataset)
    trainer.write_json = lambda name, content: None
    before = trainer.evaluate()["latent_distance"]
    losses = [trainer.advance()["latent"] for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.6 * losses[0]
    assert trainer.evaluate()["latent_distance"] < 0.8 * before


def test_a_tiny_codec_learns_a_tone(dataset, config, tmp_path):
    config.num_filters = 4
    config.save_pretrained(tmp_path / "config")
    trainer = make_trainer(
        tmp_path / "config", dataset, tmp_path / "run", learning_rate=3e-3, warmup_steps=10, whitening_weight=0.1
    )
    losses = [trainer.advance()["mel"] for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.6 * losses[0]


def test_discriminators_hear_what_is_quiet():
    """A harmonic 40 dB below the voice is there or not."""
    torch.manual_seed(0)
    discriminator = MultiScaleSTFTDiscriminator([256], 4)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3, betas=(0.8, 0.99))
    time, losses = torch.arange(2_400) / RATE, []
    for _ in range(150):
        turns = (200 + 200 * torch.rand(4, 1, 1)) * time
        loud = 0.3 * torch.sin(2 * torch.pi * (turns + torch.rand(4, 1, 1)))
        quiet = 0.003 * torch.sin(2 * torch.pi * (20 * turns + torch.rand(4, 1, 1)))
        loss = discriminator_loss(discriminator(loud + quiet), discriminator(loud))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.9 and np.mean(losses[-20:]) < 1.7


def test_bfloat16_gradients_are_those_of_float32(tmp_path):
    """With narrow layers in bfloat16, a CPU with AMX gets some of them wrong altogether."""
    config = EncodecConfig(
        upsampling_ratios=[4, 5, 5, 8], num_filters=24, hidden_size=32, num_lstm_layers=1, pad_mode="constant"
    )
    torch.manual_seed(0)
    codec = EncodecModel(config)
    trainer = CodecTrainer(codec, CodecTrainingArguments(str(tmp_path), bf16=True))
    audio, latents = torch.randn(2, 1, 6 * 800), torch.randn(2, 32, 6)
    results = []
    for context in (contextlib.nullcontext(), trainer.autocast()):
        codec.zero_grad()
        with context:
            encoded, decoded = codec.encoder(audio), codec.decoder(latents)
        torch.autograd.backward([encoded.float().sum(), decoded.float().square().sum()])
        gradients = [parameter.grad.flatten() for parameter in codec.parameters() if parameter.grad is not None]
        results.append([encoded.detach().float().flatten(), torch.cat(gradients)])
    for exact, rounded in zip(*results, strict=True):
        assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.99
