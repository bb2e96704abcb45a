"""Labels of recordings, and latents that are trained on them."""

import io
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import EncodecConfig, EncodecModel

from example_runner import run_example
from transformers_sled.training import (
    CodecModelArguments,
    LatentDataArguments,
    LatentTrainer,
    LatentTrainingArguments,
    create_codec,
    load_labelled_data,
    load_source,
)
from transformers_sled.training.alignment import LABEL_RATE, sample_labels
from transformers_sled.training.latent_trainer import LabelledSegments, LogSpectra


TESTS = Path(__file__).parents[1]
RATE = 24_000


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def config(tmp_path):
    config = EncodecConfig(
        upsampling_ratios=[2, 5, 8, 10],
        num_filters=4,
        hidden_size=6,
        num_lstm_layers=1,
        codebook_size=16,
        target_bandwidths=[0.24],
        pad_mode="constant",
    )
    config.save_pretrained(tmp_path / "config")
    return config


def write_corpus(folder, names=("a", "b", "c", "d")):
    """Utterances of half a second of silence and a noisy tone, in turns, with labels that say which is which."""
    rows, labels = [], []
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        time = np.arange(2 * RATE) / RATE
        is_tone = (time // 0.5).astype(int) % 2 == 1
        frequency = 110.0 * (1 + number % 2)
        buffer = io.BytesIO()
        sound = 0.4 * np.sin(2 * np.pi * frequency * time) + 0.1 * rng.standard_normal(len(time))
        soundfile.write(buffer, (sound * is_tone).clip(-1.0, 1.0), RATE, format="WAV")
        rows.append({"id": name, "audio": {"bytes": buffer.getvalue(), "path": None}})
        tones = [int(index / LABEL_RATE // 0.5) % 2 for index in range(2 * LABEL_RATE + 1)]
        labels.append({"id": name, "phonemes": tones, "pitch": [frequency * tone for tone in tones]})
    features = datasets.Features(
        id=datasets.Value("string"),
        phonemes=datasets.List(datasets.ClassLabel(names=["sil", "a"])),
        pitch=datasets.List(datasets.Value("float32")),
    )
    datasets.Dataset.from_list(rows).to_parquet(folder / "corpus.parquet")
    datasets.Dataset.from_list(labels, features=features).to_parquet(folder / "labels.parquet")


@pytest.fixture
def train(tmp_path, config):
    write_corpus(tmp_path)

    def run(output="latents", start=None, labels="labels.parquet", **changes):
        data_arguments = LatentDataArguments(str(tmp_path / "corpus.parquet"), str(tmp_path / labels))
        settings = {"max_steps": 6, "batch_size": 4, "segment_seconds": 1.0, "warmup_steps": 1, "logging_steps": 2}
        arguments = LatentTrainingArguments(str(tmp_path / output), **{**settings, **changes})
        torch.manual_seed(0)
        codec = create_codec(
            CodecModelArguments(str(tmp_path / "config")) if start is None else CodecModelArguments(None, str(start))
        )
        LatentTrainer(codec, arguments, load_labelled_data(data_arguments, RATE)).train()
        return tmp_path / output

    return run


def test_the_command_makes_a_codec(tmp_path, config, capsys):
    write_corpus(tmp_path)
    run_example(
        "tiny_voice/train_latents.py",
        config_name=tmp_path / "config",
        train_files=tmp_path / "corpus.parquet",
        labels=tmp_path / "labels.parquet",
        output_dir=tmp_path / "latents",
        max_steps=2,
        batch_size=2,
        segment_seconds=0.5,
        save_steps=1,
    )
    assert capsys.readouterr().out.strip().endswith("latents/export")
    assert [path.name for path in (tmp_path / "latents").glob("checkpoint-*")] == ["checkpoint-2"]
    assert EncodecModel.from_pretrained(tmp_path / "latents" / "export").quantizer.layers[0].codebook.embed.any()


def test_result_is_a_codec_with_codebooks_and_the_old_decoder(train):
    output = train(max_steps=2)
    codec = EncodecModel.from_pretrained(output / "export")
    assert all(layer.codebook.embed.any() for layer in codec.quantizer.layers)
    again = train("more", start=output / "export", max_steps=2) / "export"
    before, after = codec.state_dict(), EncodecModel.from_pretrained(again).state_dict()
    changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"encoder", "quantizer"}


def test_readers_of_a_trained_codec_learn_before_it_does(train):
    start = train(max_steps=1) / "export"
    more = {"start": start, "reader_steps": 2}
    state = EncodecModel.from_pretrained(start).encoder.state_dict()
    for steps, is_kept in ((2, True), (3, False)):
        after = EncodecModel.from_pretrained(train(f"steps_{steps}", max_steps=steps, **more) / "export").encoder
        assert all(torch.equal(tensor, state[name]) for name, tensor in after.state_dict().items()) == is_kept


def test_an_interrupted_run_ends_as_an_uninterrupted_one(train, monkeypatch):
    whole = EncodecModel.from_pretrained(train("whole") / "export").state_dict()
    train_step = LatentTrainer.train_step

    def interrupted(trainer):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return train_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(LatentTrainer, "train_step", interrupted)
        output = train("halves")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (output / "export").exists()
    halves = EncodecModel.from_pretrained(train("halves") / "export").state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, msg=name)


def test_segments_come_with_the_labels_of_their_time(tmp_path, config):
    write_corpus(tmp_path)
    arguments = LatentDataArguments(str(tmp_path / "corpus.parquet"), str(tmp_path / "labels.parquet"))
    segments = LabelledSegments(load_labelled_data(arguments, RATE), config, num_frames=45)
    samples, phonemes, pitch = segments.draw(8, torch.Generator().manual_seed(0))
    loud = samples.view(8, 45, 800).abs().amax(dim=-1) > 0.01
    # Frames that a border between silence and tone cuts may be called either.
    assert (loud == phonemes.bool()).float().mean() > 0.9
    assert (pitch > 0).equal(phonemes.bool())
    assert set(pitch.unique().tolist()) == {0.0, 110.0, 220.0}


@pytest.fixture
def logs(monkeypatch):
    logs = []
    train_step = LatentTrainer.train_step

    def recorded(trainer):
        logs.append(train_step(trainer))
        return logs[-1]

    monkeypatch.setattr(LatentTrainer, "train_step", recorded)
    return logs


def test_bfloat16_learns_as_float32_does(train, logs):
    train("float32", max_steps=4)
    train("bfloat16", max_steps=4, bf16=True)
    values = [[log[name] for name in ("spectra", "phonemes", "whitening")] for log in logs]
    assert values[:4] != values[4:]
    np.testing.assert_allclose(values[4:], values[:4], rtol=0.02)


def test_latents_learn_what_is_heard(train, logs):
    train(max_steps=110, learning_rate=3e-3, latent_noise=0.1)
    assert logs[-1]["spectra"] < 0.7 * logs[0]["spectra"]
    assert np.mean([log["phoneme_accuracy"] for log in logs[-10:]]) > 0.85


def test_spectra_are_centered_on_their_frames(config):
    spectra = LogSpectra(RATE, 800)
    audio = torch.zeros(1, 8000)
    audio[0, 800 * 4 + 300] = 1.0
    log_mel = spectra(audio)[0]
    assert log_mel.shape == (10, 4 * 80 + 128)
    # The click is in the second of the four short spectra of the fifth frame, and in the long ones around it.
    short = log_mel[:, :320].reshape(40, 80).sum(dim=1)
    assert int(short.argmax()) == 4 * 4 + 1
    assert int(log_mel[:, 320:].sum(dim=1).argmax()) == 4


def test_labels_of_other_audio_are_refused(train, tmp_path):
    write_corpus(tmp_path, names=("x",))
    shutil.move(tmp_path / "labels.parquet", tmp_path / "other.parquet")
    write_corpus(tmp_path)
    with pytest.raises(ValueError, match="has no utterance of"):
        train(labels="other.parquet")


def test_labels_are_taken_from_the_middle_of_frames():
    labels = list(range(13))
    assert sample_labels(labels, 30, 6) == [1, 3, 5, 7, 9, 11]
    assert sample_labels(labels, 30, 8)[-2:] == [12, 12]
    assert sample_labels(labels, 60, 3) == [0, 2, 2]


def test_text_becomes_phonemes_in_time(tmp_path):
    pytest.importorskip("pyworld", reason="finds pitch")
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    from transformers_sled.training.labels import phonemize

    assert phonemize("Day, night.", "en-us") == ["sil", "d", "A", "sil", "n", "I", "t", "sil"]
    utterances, output = TESTS / "fixtures" / "utterances.parquet", tmp_path / "labels.parquet"
    run_example("tiny_voice/label_speech.py", dataset=utterances, output=output, iterations=2)
    table = load_source(str(output))
    names = table.features["phonemes"].feature.names
    source = load_source(str(utterances))
    texts = dict(zip(source["id"][:], source["text"][:], strict=True))
    assert set(table["id"][:]) <= set(texts) and len(table) > 0
    for row in table:
        said = [names[number] for number in row["phonemes"]]
        changes = [name for name, before in zip(said, [None, *said], strict=False) if name != before]
        spoken = phonemize(texts[row["id"]], "en-us")
        assert changes == [name for name, before in zip(spoken, [None, *spoken], strict=False) if name != before]
        voiced = [pitch for pitch in row["pitch"] if pitch]
        assert voiced and min(voiced) >= 60 and max(voiced) <= 450
