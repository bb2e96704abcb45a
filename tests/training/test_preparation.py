"""Preparation of training data: from audio and text in any layout to EnCodec codes on disk."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoTokenizer, EncodecModel

from example_runner import EXAMPLES, run_example
from transformers_sled.training import (
    PreparationArguments,
    TokenizerArguments,
    load_manifest,
    load_source,
    prepare_dataset,
    train_tokenizer,
)


CODEC = Path(__file__).parents[1] / "fixtures" / "golden" / "codec"
RATE = 24000


@pytest.fixture(scope="module")
def codec():
    return EncodecModel.from_pretrained(CODEC).eval()


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def prepare(dataset, folder, codec, *, tokenizer=None, rank=0, world_size=1, **settings):
    arguments = PreparationArguments(str(folder), **settings)
    return prepare_dataset(dataset, codec, arguments, tokenizer=tokenizer, rank=rank, world_size=world_size)


def prepared(folder, split="train"):
    return datasets.load_dataset(str(folder), split=split, cache_dir=str(folder / "cache"))


def alone(waveform, codec):
    """Codes of one waveform by plain transformers, after padding with zeros to whole frames."""
    padded = np.pad(waveform, (0, -len(waveform) % codec.config.hop_length))
    with torch.no_grad():
        return codec.encode(torch.from_numpy(padded)[None, None], bandwidth=6.0).audio_codes[0, 0].numpy()


def cut(index, source, start=0.0, duration=1.0, **changes):
    return {
        "id": f"cut-{index}",
        "start": start,
        "duration": duration,
        "channel": 0,
        "supervisions": [{"id": f"cut-{index}", "speaker": "7", "custom": {"texts": ["As the book says.", "AS THE"]}}],
        "recording": {"sources": [{"type": "file", "channels": [0], "source": source}], "sampling_rate": RATE},
        "type": "MonoCut",
        **changes,
    }


@pytest.fixture
def corpus(tmp_path):
    """A table of ten utterances of 0.6 to 1.5 s, with paths."""
    rows = []
    for index in range(10):
        path = tmp_path / f"{index}.wav"
        soundfile.write(path, noise(int(RATE * (0.6 + 0.1 * ((index * 7) % 10))), seed=index), RATE, subtype="FLOAT")
        rows.append({"id": f"u{index}", "text": f"Sentence {index}.", "speaker": "a", "audio": str(path)})
    return datasets.Dataset.from_list(rows)


def test_rows_of_a_few_frames_get_their_own_codes(codec, tmp_path):
    lengths = [100, 900, 1700, 2600, 3300, 24000]
    dataset = datasets.Dataset.from_list(
        [{"text": "x", "audio": {"array": noise(n, seed=n), "sampling_rate": RATE}} for n in lengths]
    )
    prepare(dataset, tmp_path / "out", codec, min_duration=0.0)
    for row, length in zip(prepared(tmp_path / "out"), lengths, strict=True):
        np.testing.assert_array_equal(row["audio_codes"], alone(noise(length, seed=length), codec))


@pytest.mark.parametrize("compressed", [False, True])
def test_libriheavy_manifest(codec, tmp_path, compressed):
    recording = noise(RATE * 5)
    (tmp_path / "download").mkdir()
    soundfile.write(tmp_path / "download" / "book.flac", recording, RATE, subtype="PCM_24")
    cuts = [cut(0, "download/book.flac", 0.5, 1.25), cut(1, "download/book.flac", 3.0, 2.0)]
    cuts[1]["supervisions"][0] = {"text": "Plain text.", "speaker": "8"}
    lines = "".join(json.dumps(line) + "\n" for line in cuts)
    manifest = tmp_path / ("cuts.jsonl.gz" if compressed else "cuts.jsonl")
    manifest.write_bytes(gzip.compress(lines.encode()) if compressed else lines.encode())

    report = prepare(load_manifest(str(manifest)), tmp_path / "out", codec, audio_root=tmp_path)

    assert report["kept"] == report["items"] == 2
    first, second = prepared(tmp_path / "out")
    assert (first["id"], first["text"], first["speaker"]) == ("cut-0", "As the book says.", "7")
    assert (second["text"], second["speaker"]) == ("Plain text.", "8")
    assert first["duration"] == pytest.approx(1.25)
    assert first["length"] == len(first["audio_codes"][0]) == 94
    decoded, _ = soundfile.read(tmp_path / "download" / "book.flac", dtype="float32")
    np.testing.assert_array_equal(first["audio_codes"], alone(decoded[12000:42000], codec))
    np.testing.assert_array_equal(second["audio_codes"], alone(decoded[72000:], codec))


def test_a_manifest_cut_short_in_its_compression(tmp_path):
    lines = "".join(json.dumps(cut(index, "a.flac")) + "\n" for index in range(500)).encode()
    (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(lines)[:-200])
    with pytest.raises(ValueError, match=r"cuts\.jsonl\.gz cannot be read to the end"):
        load_manifest(str(tmp_path / "cuts.jsonl.gz"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_manifest(str(tmp_path / "nowhere.jsonl"))


def test_what_cannot_be_used_is_counted_named_and_skipped(codec, tmp_path):
    soundfile.write(tmp_path / "good.wav", noise(RATE), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan, dtype=np.float32), RATE, subtype="FLOAT")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "garbage.wav").write_bytes(b"this is no audio" * 100)
    no_text = cut("no_text", "good.wav")
    no_text["supervisions"] = [{"text": "", "custom": {"texts": ["  "]}}]
    lines = [
        json.dumps(cut("good", "good.wav")),
        json.dumps(cut("broken", "good.wav"))[:80],
        json.dumps(cut("no_recording", "good.wav", recording=None)),
        json.dumps(cut("no_start", "good.wav", start=None)),
        json.dumps(cut("two_speakers", "good.wav", supervisions=[{"text": "a"}, {"text": "b"}])),
        json.dumps(cut("missing", "nowhere.wav")),
        json.dumps(cut("empty", "empty.wav")),
        json.dumps(cut("garbage", "garbage.wav")),
        json.dumps(cut("nan", "nan.wav")),
        json.dumps(cut("beyond", "good.wav", start=5.0)),
        json.dumps(cut("overhang", "good.wav", start=0.5, duration=0.9)),
        json.dumps(cut("short", "good.wav", duration=0.2)),
        json.dumps(cut("long", "good.wav", duration=30.0)),
        json.dumps(no_text),
        "",
        json.dumps(cut("last", "good.wav")),
    ]
    (tmp_path / "cuts.jsonl").write_text("\n".join(lines))

    report = prepare(
        load_manifest(str(tmp_path / "cuts.jsonl")),
        tmp_path / "out",
        codec,
        audio_root=tmp_path,
        max_duration=20.0,
        shard_size=5,
    )

    assert prepared(tmp_path / "out")["id"] == ["cut-good", "cut-last"]
    assert report["dropped"] == {
        "manifest line is not JSON": 2,
        "manifest line lacks a field": 2,
        "cut is outside its recording": 2,
        "cut does not have one supervision and one source": 1,
        "audio file is missing": 1,
        "empty audio": 1,
        "unreadable audio": 1,
        "audio is not finite": 1,
        "too short": 1,
        "too long": 1,
        "text is empty": 1,
    }
    assert report["items"] == report["kept"] + sum(report["dropped"].values()) == 16
    assert report == json.loads((tmp_path / "out" / "preparation" / "train-report.json").read_text())
    dropped = [
        json.loads(line)
        for line in (tmp_path / "out" / "preparation" / "train-dropped.jsonl").read_text().splitlines()
    ]
    assert {(item["row"], item["id"]) for item in dropped} >= {(1, None), (5, "cut-missing"), (10, "cut-overhang")}
    assert "nowhere.wav' does not exist" in next(item["detail"] for item in dropped if item["id"] == "cut-missing")


def test_a_shard_with_nothing_to_keep(codec, tmp_path, corpus):
    report = prepare(corpus, tmp_path / "out", codec, min_duration=1.0, shard_size=1)
    assert 0 < report["kept"] < report["items"] == report["shards"] == report["shards_done"] == 10
    assert len(prepared(tmp_path / "out")) == report["kept"]


def test_positions_count_tokens_and_frames(codec, tmp_path, corpus):
    tokenizer = AutoTokenizer.from_pretrained(CODEC.parent / "offline")
    lengths = [
        len(tokenizer(row["text"]).input_ids) + -(-soundfile.info(row["audio"]).frames // 320) for row in corpus
    ]
    limit = sorted(lengths)[4]
    report = prepare(corpus, tmp_path / "out", codec, tokenizer=tokenizer, max_positions=limit)
    assert report["kept"] == sum(length <= limit for length in lengths)
    assert report["dropped"] == {"too many positions": 10 - report["kept"]}


def write_folder(folder, corpus, suffix):
    for row in corpus:
        os.link(row["audio"], folder / Path(row["audio"]).name)
    table = corpus.map(lambda row: {"file_name": Path(row["audio"]).name}, remove_columns="audio")
    table.to_csv(folder / "metadata.csv") if suffix == "csv" else table.to_json(folder / "metadata.jsonl")


@pytest.mark.parametrize("layout", ["paths", "folder_csv", "folder_jsonl", "parquet", "audio_feature", "saved"])
def test_every_layout_gives_the_same_codes(codec, tmp_path, corpus, layout):
    expected = [alone(soundfile.read(row["audio"], dtype="float32")[0], codec) for row in corpus]
    source = tmp_path / "source"
    source.mkdir()
    with_bytes = corpus.map(
        lambda row: {"audio": {"bytes": Path(row["audio"]).read_bytes(), "path": None}}, remove_columns="audio"
    )
    if layout.startswith("folder"):
        write_folder(source, corpus, layout.removeprefix("folder_"))
        dataset = load_source(str(source))
    elif layout == "parquet":
        with_bytes.to_parquet(source / "data.parquet")
        dataset = load_source(str(source / "data.parquet"))
    elif layout == "saved":
        with_bytes.save_to_disk(source)
        dataset = load_source(str(source))
        with pytest.raises(ValueError, match=r"`split` must be one of \['train'\]"):
            load_source(str(source), split="train[:50%]")
    else:
        dataset = corpus if layout == "paths" else with_bytes.cast_column("audio", datasets.Audio(decode=False))
    prepare(dataset, tmp_path / "out", codec)
    rows = prepared(tmp_path / "out")
    assert rows["id"] == corpus["id"]
    for row, codes in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row["audio_codes"], codes)


def test_what_is_prepared_later_is_loaded(codec, tmp_path, corpus):
    folder = str(tmp_path / "out")
    prepare(corpus, folder, codec, shard_size=1, rank=0, world_size=2)
    first = load_source(folder)
    prepare(corpus, folder, codec, shard_size=1, rank=1, world_size=2)
    assert len(first) < len(load_source(folder)) == len(corpus)
    assert len(load_source(folder, split="train[:1]")) == 1


def test_processes_share_the_work(codec, tmp_path, corpus):
    prepare(corpus, tmp_path / "one", codec, shard_size=3)
    first = prepare(corpus, tmp_path / "two", codec, shard_size=3, rank=1, world_size=2, num_workers=2)
    assert (first["shards_done"], first["shards"]) == (2, 4)
    last = prepare(corpus, tmp_path / "two", codec, shard_size=3, rank=0, world_size=2)
    assert last["shards_done"] == 4
    assert prepared(tmp_path / "one").to_list() == prepared(tmp_path / "two").to_list()


KILLED_AT_THIRD_SHARD = """
import os, runpy, signal, sys
replace = os.replace
def replace_until_killed(source, target):
    if str(target).endswith("train-000002.parquet"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_until_killed
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_killed_and_run_again_loses_and_repeats_nothing(codec, tmp_path, corpus):
    prepare(corpus, tmp_path / "whole", codec, shard_size=2)
    corpus.to_parquet(tmp_path / "table.parquet")
    arguments = ["--dataset", str(tmp_path / "table.parquet"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--codec", str(CODEC), "--shard_size", "2"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_THIRD_SHARD, str(EXAMPLES / "prepare_data.py"), *arguments],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    written = sorted((tmp_path / "out" / "data").glob("train-*.parquet"))
    assert len(written) == 2
    times = [path.stat().st_mtime_ns for path in written]

    report = prepare(load_source(str(tmp_path / "table.parquet")), tmp_path / "out", codec, shard_size=2)
    assert report["kept"] == 10
    assert [path.stat().st_mtime_ns for path in written] == times
    assert prepared(tmp_path / "out").to_list() == prepared(tmp_path / "whole").to_list()
    assert not list((tmp_path / "out" / "data").glob(".*"))


def test_two_splits_share_a_folder(codec, tmp_path, corpus):
    prepare(corpus.select(range(7)), tmp_path / "out", codec)
    prepare(corpus.select(range(7, 10)), tmp_path / "out", codec, split="validation")
    assert len(prepared(tmp_path / "out")) == 7
    assert prepared(tmp_path / "out", "validation")["id"] == ["u7", "u8", "u9"]


def test_other_settings_do_not_mix(codec, tmp_path, corpus):
    prepare(corpus, tmp_path / "out", codec)
    with pytest.raises(ValueError, match=r"min_duration was 0\.5 and is 0\.8"):
        prepare(corpus, tmp_path / "out", codec, min_duration=0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_column": "sentence"}, "`text_column` must be one of the columns"),
        ({"audio_column": "wav"}, "`audio_column` must be one of the columns"),
        ({"bandwidth": 5.0}, r"`bandwidth` is 5\.0 kbit/s"),
        ({"rank": 2, "world_size": 2}, "`rank` must be"),
        ({"min_duration": 3.0, "max_duration": 2.0}, "`min_duration` must be"),
        ({"shard_size": 0}, "`shard_size` must be"),
        ({"split": "train[:5%]"}, "`split` must be"),
    ],
)
def test_bad_arguments(codec, tmp_path, corpus, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path / "out", codec, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_codec_without_codebooks(codec, tmp_path, corpus):
    with pytest.raises(ValueError, match="empty codebooks"):
        prepare(corpus, tmp_path / "out", EncodecModel(codec.config))


def test_a_trained_tokenizer_has_the_released_layout(tmp_path):
    texts = ["Der Bär läuft über die Brücke.", "Die Brücke über den Fluß ist grün.", "今日は良い天気です。"] * 20
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    files = {"text_files": tmp_path / "texts.txt", "output_dir": tmp_path / "tokenizer"}
    run_example("train_tokenizer.py", vocab_size=300, **files)
    released = AutoTokenizer.from_pretrained(CODEC.parent / "offline")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(tokenizer) is type(released)
    assert tokenizer.vocab_size == 300
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.mask_token_id == 300
    assert tokenizer.padding_side == "left"
    for text in [*texts[:3], "Something else: ñandú, 你好 🙂"]:
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (0, 2)
        assert 3 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [(["", ""], 300, "is it empty"), (["Some text."], 100, "`vocab_size` must be at least 260")],
)
def test_a_tokenizer_cannot_be_trained_on_nothing(tmp_path, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer([texts], TokenizerArguments(str(tmp_path / "tokenizer"), vocab_size))
