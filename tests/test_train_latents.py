"""Labels of recordings, and latents that are trained on them."""

import io
import shutil
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import EncodecConfig, EncodecModel


sys.path.append(str(Path(__file__).parents[1] / "examples" / "tiny_voice"))

import align_text
import train_latents


RATE = 24_000


@pytest.fixture(autouse=True)
def signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
        tones = [int(index / align_text.LABEL_RATE // 0.5) % 2 for index in range(2 * align_text.LABEL_RATE + 1)]
        labels.append({"id": name, "phonemes": tones, "pitch": [frequency * tone for tone in tones]})
    features = datasets.Features(
        id=datasets.Value("string"),
        phonemes=datasets.List(datasets.ClassLabel(names=["sil", "a"])),
        pitch=datasets.List(datasets.Value("float32")),
    )
    datasets.Dataset.from_list(rows).to_parquet(folder / "corpus.parquet")
    datasets.Dataset.from_list(labels, features=features).to_parquet(folder / "labels.parquet")


@pytest.fixture
def train(tmp_path, config, monkeypatch):
    write_corpus(tmp_path)

    def run(output="latents", **changes):
        values = {
            "config_name": tmp_path / "config",
            "train_files": tmp_path / "corpus.parquet",
            "labels": tmp_path / "labels.parquet",
            "output_dir": tmp_path / output,
            "max_steps": 6,
            "batch_size": 4,
            "segment_seconds": 1.0,
            "warmup_steps": 1,
            "logging_steps": 2,
            **changes,
        }
        values = {name: value for name, value in values.items() if value is not None}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["train_latents.py", *words])
        train_latents.main()
        return tmp_path / output

    return run


def test_result_is_a_codec_with_codebooks_and_the_old_decoder(train):
    output = train(max_steps=2)
    codec = EncodecModel.from_pretrained(output / "export")
    assert all(layer.codebook.embed.any() for layer in codec.quantizer.layers)
    again = train("more", config_name=None, model_name_or_path=output / "export", max_steps=2) / "export"
    before, after = codec.state_dict(), EncodecModel.from_pretrained(again).state_dict()
    changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"encoder", "quantizer"}


def test_readers_of_a_trained_codec_learn_before_it_does(train):
    start = train(max_steps=1) / "export"
    more = {"config_name": None, "model_name_or_path": start, "reader_steps": 2}
    state = EncodecModel.from_pretrained(start).encoder.state_dict()
    for steps, is_kept in ((2, True), (3, False)):
        after = EncodecModel.from_pretrained(train(f"steps_{steps}", max_steps=steps, **more) / "export").encoder
        assert all(torch.equal(tensor, state[name]) for name, tensor in after.state_dict().items()) == is_kept


def test_an_interrupted_run_ends_as_an_uninterrupted_one(train, monkeypatch):
    whole = EncodecModel.from_pretrained(train("whole") / "export").state_dict()
    train_step = train_latents.LatentTrainer.train_step

    def interrupted(trainer, segments):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return train_step(trainer, segments)

    with monkeypatch.context() as patch:
        patch.setattr(train_latents.LatentTrainer, "train_step", interrupted)
        output = train("halves")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (output / "export").exists()
    halves = EncodecModel.from_pretrained(train("halves") / "export").state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, msg=name)


def test_segments_come_with_the_labels_of_their_time(tmp_path, config):
    write_corpus(tmp_path)
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "corpus.parquet"))
    labels = datasets.Dataset.from_parquet(str(tmp_path / "labels.parquet")).with_format("numpy")
    audio = train_latents.AudioCache(tmp_path / "audio", dataset, "audio", RATE)
    segments = train_latents.LabelledSegments(
        audio, labels["phonemes"][:], labels["pitch"][:], RATE, hop_length=800, num_frames=45
    )
    samples, phonemes, pitch = segments.draw(8, torch.Generator().manual_seed(0))
    loud = samples.view(8, 45, 800).abs().amax(dim=-1) > 0.01
    # Frames that a border between silence and tone cuts may be called either.
    assert (loud == phonemes.bool()).float().mean() > 0.9
    assert (pitch > 0).equal(phonemes.bool())
    assert set(pitch.unique().tolist()) == {0.0, 110.0, 220.0}


@pytest.fixture
def logs(monkeypatch):
    logs = []
    train_step = train_latents.LatentTrainer.train_step

    def recorded(trainer, segments):
        logs.append(train_step(trainer, segments))
        return logs[-1]

    monkeypatch.setattr(train_latents.LatentTrainer, "train_step", recorded)
    return logs


def test_bfloat16_learns_as_float32_does(train, logs):
    train("float32", max_steps=4)
    train("bfloat16", max_steps=4, bf16=True)
    for name in ("spectra", "phonemes", "whitening"):
        values = [log[name] for log in logs]
        assert values[:4] != values[4:]
        assert values[4:] == pytest.approx(values[:4], rel=0.02)


def test_latents_learn_what_is_heard(train, logs):
    train(max_steps=110, learning_rate=3e-3, latent_noise=0.1)
    assert logs[-1]["spectra"] < 0.7 * logs[0]["spectra"]
    assert np.mean([log["phoneme_accuracy"] for log in logs[-10:]]) > 0.85


def test_spectra_are_centered_on_their_frames(config):
    spectra = train_latents.LogSpectra(RATE, 800)
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
    with pytest.raises(SystemExit, match="has no utterance of"):
        train(labels=tmp_path / "other.parquet")


def test_labels_are_taken_from_the_middle_of_frames():
    labels = list(range(13))
    assert align_text.sample_labels(labels, 30, 6) == [1, 3, 5, 7, 9, 11]
    assert align_text.sample_labels(labels, 30, 8)[-2:] == [12, 12]
    assert align_text.sample_labels(labels, 60, 3) == [0, 2, 2]


def test_text_becomes_phonemes_in_time(tmp_path, monkeypatch):
    pytest.importorskip("pyworld", reason="finds pitch")
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    import label_speech

    assert label_speech.phonemize("Day, night.", "en-us") == ["sil", "d", "A", "sil", "n", "I", "t", "sil"]
    utterances = Path(__file__).parent / "fixtures" / "utterances.parquet"
    output = tmp_path / "labels.parquet"
    words = ["--dataset", utterances, "--output", output, "--iterations", "2"]
    monkeypatch.setattr(sys, "argv", ["label_speech.py", *map(str, words)])
    label_speech.main()
    table = datasets.Dataset.from_parquet(str(output))
    names = table.features["phonemes"].feature.names
    texts = dict(
        zip(*(datasets.Dataset.from_parquet(str(utterances))[name][:] for name in ("id", "text")), strict=True)
    )
    assert set(table["id"][:]) <= set(texts) and len(table) > 0
    for row in table:
        said = [names[number] for number in row["phonemes"]]
        changes = [name for name, before in zip(said, [None, *said], strict=False) if name != before]
        spoken = label_speech.phonemize(texts[row["id"]], "en-us")
        assert changes == [name for name, before in zip(spoken, [None, *spoken], strict=False) if name != before]
        voiced = [pitch for pitch in row["pitch"] if pitch]
        assert voiced and min(voiced) >= 60 and max(voiced) <= 450
