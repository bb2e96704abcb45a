"""Training of a codec: quantizer, losses, and the script from parquet to an exported `EncodecModel`."""

import dataclasses
import importlib.util
import io
import json
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import EncodecConfig, EncodecFeatureExtractor, EncodecModel


EXAMPLES = Path(__file__).parents[1] / "examples"
UTTERANCES = Path(__file__).parent / "fixtures" / "utterances.parquet"
RATE = 24_000


def load_script():
    specification = importlib.util.spec_from_file_location("train_codec", EXAMPLES / "train_codec.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["train_codec"] = module
    specification.loader.exec_module(module)
    return module


train_codec = load_script()


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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


def run(monkeypatch, corpus, config_name, output_dir, *arguments):
    command = f"train_codec.py --train_files {corpus} --output_dir {output_dir} --num_eval_samples 2 "
    command += "--segment_seconds 0.2 --batch_size 4 --warmup_steps 1 --kmeans_vectors 64 --logging_steps 1 "
    command += "--mel_n_ffts 512 256 --mel_num_bins 40 20 --discriminator_n_ffts 256 --discriminator_filters 2"
    if config_name is not None:
        command += f" --config_name {config_name}"
    monkeypatch.setattr(sys, "argv", [*command.split(), *(str(argument) for argument in arguments)])
    train_codec.main()


def random_quantizer(config, seed=0):
    quantizer = EncodecModel(config).quantizer
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(512, config.hidden_size, generator=generator)
    train_codec.initialize_codebooks(quantizer, latents, 64, 10, generator)
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
    mel_loss = train_codec.MelLoss(RATE, [2048, 1024, 512, 256], [160, 100, 64, 32])
    corpus = datasets.load_dataset("parquet", data_files=str(UTTERANCES), split="train")
    for row in corpus.cast_column("audio", datasets.Audio(decode=False)):
        audio = torch.from_numpy(train_codec.decode_audio(row["audio"], RATE)).float() / 32767
        resynthesis, latents = train_codec.resynthesize(codec, audio)
        assert latents.shape == (-(-len(audio) // 800), 32)
        # In nepers; silence is at 1.7.
        assert mel_loss(resynthesis[None, None], audio[None, None])[0] < 0.5


def test_frames_that_do_not_divide_the_rate_are_refused(tmp_path, config):
    config.upsampling_ratios = [8, 5, 4, 4]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="upsampling_ratios"):
        train_codec.create_codec(train_codec.ModelArguments(config_name=str(tmp_path)))


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
    quantized, commitment, _ = train_codec.quantize(quantizer, latents, decay=0.99, dead_code_threshold=0.0)
    torch.testing.assert_close(quantized, expected)
    assert commitment > 0


def test_gradients_pass_straight_through_the_quantizer(config):
    quantizer, latents = random_quantizer(config)
    latents = latents.T[None].clone().requires_grad_()
    quantized, _, _ = train_codec.quantize(quantizer, latents, decay=0.99, dead_code_threshold=0.1)
    weights = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad((quantized * weights).sum(), [latents])
    torch.testing.assert_close(gradient, weights)


def test_commitment_pulls_latents_to_their_codes(config):
    quantizer, latents = random_quantizer(config)
    latents = latents.T[None].clone().requires_grad_()
    codes = quantizer.decode(quantizer.encode(latents)).detach()
    _, commitment, _ = train_codec.quantize(quantizer, latents, decay=0.99, dead_code_threshold=0.0)
    (gradient,) = torch.autograd.grad(commitment, [latents])
    moved = latents.detach() - 10.0 * gradient
    assert (moved - codes).square().mean() < (latents.detach() - codes).square().mean()


def test_codes_converge_to_the_means_of_their_vectors(config):
    quantizer, _ = random_quantizer(config)
    codebook = quantizer.layers[0].codebook
    vectors = torch.randn(256, config.hidden_size)
    indices = torch.arange(256) % config.codebook_size
    for _ in range(200):
        train_codec.update_codebook(codebook, vectors, indices, decay=0.9, dead_code_threshold=0.1)
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
    replaced = train_codec.update_codebook(codebook, vectors, indices, decay=0.99, dead_code_threshold=0.05)
    assert replaced >= 1
    assert (vectors - codebook.embed[3]).abs().sum(dim=1).min() < 1e-5


def test_too_few_vectors_for_the_codebooks_are_refused(config):
    quantizer = EncodecModel(config).quantizer
    with pytest.raises(ValueError, match="16 codes"):
        train_codec.initialize_codebooks(quantizer, torch.randn(15, 4), 64, 1, torch.Generator())


# Losses


def test_mel_loss_hears_level_and_pitch_alike():
    loss = train_codec.MelLoss(RATE, [1024, 256], [64, 20])
    time = torch.arange(RATE) / RATE
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * time)[None, None]
    other = 0.3 * torch.sin(2 * torch.pi * 880 * time)[None, None]
    assert loss(tone, tone)[0] == 0
    assert 0 < loss(tone, 0.5 * tone)[0] < np.log(2.0)
    assert loss(tone, other)[0] > loss(tone, 0.9 * tone)[0]


def test_magnitude_distance_minds_the_loud():
    loss = train_codec.MelLoss(RATE, [1024, 256], [64, 20])
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
        train_codec.MelLoss(RATE, [1024, 256], [64])


def test_whitening_wants_uncorrelated_dimensions_of_unit_variance():
    white = torch.randn(4, 8, 1000, generator=torch.Generator().manual_seed(0))
    same = white[:, :1].expand(4, 8, 1000)
    assert train_codec.whitening_loss(white) < 0.05
    assert train_codec.whitening_loss(same) == pytest.approx(7.0, rel=0.2)
    assert train_codec.whitening_loss(white + 1.0) == pytest.approx(1.0, rel=0.2)
    assert train_codec.whitening_loss(0.01 * white) == pytest.approx(1.0, rel=0.2)


def test_balancer_makes_weights_the_shares_whatever_the_scale():
    audio = torch.zeros(2, 1, 100, requires_grad=True)
    first, second = torch.randn(100), torch.randn(100)
    shares = []
    for scale in (1.0, 1e4):
        losses = {"a": (audio * first).sum() * scale, "b": (audio * second).sum()}
        shares.append(train_codec.GradientBalancer().gradient(losses, {"a": 3.0, "b": 1.0}, audio))
    torch.testing.assert_close(shares[0], shares[1])
    expected = 0.75 * first / first.norm() + 0.25 * second / second.norm()
    torch.testing.assert_close(shares[0], expected.expand(2, 1, 100))


def test_discriminator_learns_to_tell_noise_from_tones():
    torch.manual_seed(0)
    discriminator = train_codec.MultiScaleSTFTDiscriminator([256, 128], 4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    time = torch.arange(4000) / RATE
    tones = torch.stack([torch.sin(2 * torch.pi * pitch * time) for pitch in (200, 300, 400, 500)])[:, None] * 0.3
    for _ in range(30):
        noise = 0.3 * torch.randn_like(tones)
        loss = train_codec.discriminator_loss(discriminator(tones), discriminator(noise))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    real, fake = discriminator(tones), discriminator(0.3 * torch.randn_like(tones))
    assert train_codec.adversarial_loss(fake) > train_codec.adversarial_loss(real)
    assert train_codec.feature_matching_loss(real, real) == 0
    assert train_codec.feature_matching_loss(real, fake) > 0.1


# Data


def test_audio_is_decoded_resampled_and_mixed_once(corpus, tmp_path):
    dataset = datasets.load_dataset("parquet", data_files=str(corpus), split="train")
    data = train_codec.AudioCache(tmp_path / "audio", dataset, "audio", RATE)
    assert len(data) == 10
    assert [len(data[index]) for index in range(3)] == [int(0.3 * RATE), int(0.35 * RATE), int(0.4 * RATE)]
    assert 0.49 < float(data[5].abs().max()) < 0.51
    written = (tmp_path / "audio" / "samples.int16").stat().st_mtime_ns
    train_codec.AudioCache(tmp_path / "audio", dataset, "audio", RATE)
    assert (tmp_path / "audio" / "samples.int16").stat().st_mtime_ns == written
    train_codec.AudioCache(tmp_path / "audio", dataset.select(range(4)), "audio", RATE)
    assert (tmp_path / "audio" / "samples.int16").stat().st_mtime_ns != written


def test_segments_are_pieces_of_utterances(corpus, tmp_path):
    dataset = datasets.load_dataset("parquet", data_files=str(corpus), split="train")
    data = train_codec.AudioCache(tmp_path / "audio", dataset, "audio", RATE)
    segments = data.segments(16, 2400, torch.Generator().manual_seed(0))
    assert segments.shape == (16, 1, 2400)
    assert (segments.abs().amax(dim=(1, 2)) > 0.4).all()
    long = data.segments(4, RATE, torch.Generator().manual_seed(0))
    assert (long[:, :, -2400:] == 0).all()


def test_unusable_data_arguments_are_refused(corpus):
    with pytest.raises(ValueError, match=r"dataset_name.*train_files"):
        train_codec.load_data(train_codec.DataArguments(), 0)
    with pytest.raises(ValueError, match="No file matches"):
        train_codec.load_data(train_codec.DataArguments(train_files="missing-*.parquet"), 0)
    with pytest.raises(ValueError, match="audio_column_name"):
        train_codec.load_data(train_codec.DataArguments(train_files=str(corpus), audio_column_name="speech"), 0)
    with pytest.raises(ValueError, match="num_eval_samples"):
        train_codec.load_data(train_codec.DataArguments(train_files=str(corpus), num_eval_samples=10), 0)


# The script


def test_all_phases_run_and_the_export_is_an_encodec(monkeypatch, corpus, tmp_path, config):
    config.save_pretrained(tmp_path / "config")
    output_dir = tmp_path / "run"
    run(
        monkeypatch, corpus, tmp_path / "config", output_dir,
        "--max_steps", 6, "--quantizer_start_step", 2, "--discriminator_start_step", 3,
        "--adversarial_start_step", 4, "--discriminator_update_probability", 1.0,
        "--eval_steps", 3, "--save_steps", 2, "--bf16", "--waveform_weight", 0.1, "--magnitude_weight", 0.5,
    )  # fmt: skip
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


def test_an_interrupted_run_ends_as_an_uninterrupted_one(monkeypatch, corpus, tmp_path, config):
    config.save_pretrained(tmp_path / "config")
    arguments = [
        "--max_steps", 6, "--quantizer_start_step", 1, "--discriminator_start_step", 2,
        "--adversarial_start_step", 3, "--eval_steps", 100, "--save_steps", 100,
    ]  # fmt: skip
    run(monkeypatch, corpus, tmp_path / "config", tmp_path / "whole", *arguments)

    train_step = train_codec.CodecTrainer.train_step

    def interrupted(trainer, data):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return train_step(trainer, data)

    monkeypatch.setattr(train_codec.CodecTrainer, "train_step", interrupted)
    run(monkeypatch, corpus, tmp_path / "config", tmp_path / "halves", *arguments)
    assert [path.name for path in (tmp_path / "halves").glob("checkpoint-*")] == ["checkpoint-3"]
    monkeypatch.setattr(train_codec.CodecTrainer, "train_step", train_step)
    run(monkeypatch, corpus, tmp_path / "config", tmp_path / "halves", *arguments)

    whole, halves = (
        EncodecModel.from_pretrained(tmp_path / name / "export").state_dict() for name in ("whole", "halves")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, msg=name)


def test_a_frozen_encoder_leaves_codes_as_they_are(monkeypatch, corpus, tmp_path, config):
    config.save_pretrained(tmp_path / "config")
    arguments = ["--max_steps", 3, "--quantizer_start_step", 1, "--eval_steps", 100, "--save_steps", 100]
    run(monkeypatch, corpus, tmp_path / "config", tmp_path / "run", *arguments)
    exported = tmp_path / "run" / "export"
    run(
        monkeypatch, corpus, None, tmp_path / "decoder", *arguments,
        "--model_name_or_path", exported, "--freeze_encoder",
    )  # fmt: skip
    before = EncodecModel.from_pretrained(exported).state_dict()
    after = EncodecModel.from_pretrained(tmp_path / "decoder" / "export").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_freezing_needs_trained_codebooks(config):
    codec = EncodecModel(config)
    arguments = train_codec.CodecTrainingArguments(output_dir="unused")
    with pytest.raises(ValueError, match="freeze_encoder"):
        train_codec.CodecTrainer(codec, train_codec.ModelArguments(freeze_encoder=True), arguments, 4800)


def test_latent_loss_alone_teaches_the_decoder_what_the_encoder_heard(corpus, tmp_path, config):
    config.num_filters = 4
    config.save_pretrained(tmp_path / "config")
    dataset = datasets.load_dataset("parquet", data_files=str(corpus), split="train")
    data = train_codec.AudioCache(tmp_path / "audio", dataset, "audio", RATE)
    torch.manual_seed(0)
    codec = train_codec.create_codec(train_codec.ModelArguments(config_name=str(tmp_path / "config")))
    with torch.no_grad():
        codec.encoder.layers[-1].conv.weight *= 1.0 / codec.encoder(data.segments(8, 4800, torch.Generator())).std()
    arguments = train_codec.CodecTrainingArguments(
        output_dir="unused", quantizer_start_step=0, kmeans_vectors=400, batch_size=4, learning_rate=3e-3,
        warmup_steps=1, latent_noise=0.0, mel_weight=0.0, latent_weight=1.0,
    )  # fmt: skip
    unfrozen = dataclasses.replace(arguments, latent_weight=0.0)
    train_codec.CodecTrainer(codec, train_codec.ModelArguments(), unfrozen, 4800).start_quantizer(data)
    trainer = train_codec.CodecTrainer(codec, train_codec.ModelArguments(freeze_encoder=True), arguments, 4800)
    before = train_codec.evaluate(codec, data, trainer.mel_loss, True, [], None)["latent_distance"]
    losses = [trainer.train_step(data)["latent"] for _ in range(80)]
    after = train_codec.evaluate(codec, data, trainer.mel_loss, True, [], None)["latent_distance"]
    assert np.mean(losses[-10:]) < 0.6 * losses[0]
    assert after < 0.8 * before


def test_latent_loss_needs_a_frozen_encoder(config):
    arguments = train_codec.CodecTrainingArguments(output_dir="unused", latent_weight=1.0)
    with pytest.raises(ValueError, match=r"latent_weight.*freeze_encoder"):
        train_codec.CodecTrainer(EncodecModel(config), train_codec.ModelArguments(), arguments, 4800)


def test_a_tiny_codec_learns_a_tone(corpus, tmp_path, config):
    config.num_filters = 4
    config.save_pretrained(tmp_path / "config")
    torch.manual_seed(0)
    codec = train_codec.create_codec(train_codec.ModelArguments(config_name=str(tmp_path / "config")))
    arguments = train_codec.CodecTrainingArguments(
        output_dir=str(tmp_path / "run"),
        batch_size=4,
        learning_rate=3e-3,
        warmup_steps=10,
        mel_n_ffts=[512, 256],
        mel_num_bins=[40, 20],
    )
    dataset = datasets.load_dataset("parquet", data_files=str(corpus), split="train")
    data = train_codec.AudioCache(tmp_path / "audio", dataset, "audio", RATE)
    trainer = train_codec.CodecTrainer(codec, train_codec.ModelArguments(), arguments, 4800)
    losses = [trainer.train_step(data)["mel"] for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.6 * losses[0]
