"""The evaluation from its command line, on the golden checkpoints with random recognizers and speaker encoders."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch


pytest.importorskip("jiwer")
pytest.importorskip("matplotlib")
datasets = pytest.importorskip("datasets")

EVALUATION = Path(__file__).parents[1] / "evaluation"
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
sys.path.insert(0, str(EVALUATION))

import run_eval  # noqa: E402
import score_short_texts  # noqa: E402
import score_words  # noqa: E402
from protocols import SpeechDataset, pair_with_prompts  # noqa: E402
from results import RecordStore, write_file  # noqa: E402
from synthesis import utterance_seed  # noqa: E402
from transformers_sled import builtin_voice  # noqa: E402


TEXTS = [
    "The dog barked all night.",
    "She left.",
    "Two plus two is four.",
    "He came back late.",
    "It rained.",
    "They sat by the fire and sang.",
]


def wav_bytes(seed: int, seconds: float, sampling_rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    noise = 0.2 * np.random.default_rng(seed).standard_normal(int(seconds * sampling_rate))
    soundfile.write(buffer, noise, sampling_rate, format="WAV")
    return buffer.getvalue()


def write_dataset(path: Path, rows: list[dict]) -> str:
    """A Parquet file as the Hub has them; a row without audio gets noise as long as its `seconds`."""
    table = []
    for index, row in enumerate(rows):
        seconds = row.pop("seconds", 0.5)
        content = row.pop("content", None) or wav_bytes(index, seconds)
        table.append(
            {"id": f"u{index}", "text": "A word.", "speaker": "a", **row, "audio": {"bytes": content, "path": None}}
        )
    datasets.Dataset.from_list(table).to_parquet(str(path))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def corpus(folder) -> str:
    rows = [
        {"text": text, "speaker": "ab"[index % 2], "seconds": 0.7 + 0.05 * index} for index, text in enumerate(TEXTS)
    ]
    return write_dataset(folder / "corpus.parquet", rows)


@pytest.fixture(scope="module")
def recognizer(folder) -> str:
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    path = folder / "recognizer"
    path.mkdir()
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    (path / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(str(path / "vocab.json")).save_pretrained(path)
    Wav2Vec2FeatureExtractor().save_pretrained(path)
    torch.manual_seed(0)
    config = Wav2Vec2Config(vocab_size=len(letters), **tiny_speech_model())
    Wav2Vec2ForCTC(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def encoder(folder) -> str:
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    path = folder / "encoder"
    torch.manual_seed(0)
    config = WavLMConfig(tdnn_dim=[16, 16, 16, 16, 32], xvector_output_dim=24, **tiny_speech_model())
    WavLMForXVector(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor().save_pretrained(path)
    return str(path)


def tiny_speech_model() -> dict:
    return {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }


@pytest.fixture(scope="module")
def judges(recognizer, encoder) -> list[str]:
    return ["--recognizer", recognizer, "--speaker-encoder", encoder, "--min-seconds", "0.1"]


def edit_generation_config(model: Path, **settings: float) -> None:
    path = model / "generation_config.json"
    config = json.loads(path.read_text())
    # Where this is set, as in the released files, parameters that are SLED's own are not read.
    config.pop("_from_model_config", None)
    path.write_text(json.dumps({**config, **settings}))


def brief(folder: Path, name: str) -> list[str]:
    """A golden checkpoint that is stopped after a few frames: random weights seldom end."""
    path = folder / name
    shutil.copytree(GOLDEN / name, path)
    edit_generation_config(path, max_new_tokens=20)
    return ["--model", str(path), "--codec", str(GOLDEN / "codec")]


@pytest.fixture(scope="module")
def offline(folder, corpus, judges) -> list[str]:
    """A run of the offline checkpoint under its three protocols."""
    model = brief(folder, "offline")
    return [*model, *judges, "--dataset", corpus, "--prompt-seconds", "0.2", "--latency-utterances", "1"]


def evaluate_in(output: Path, arguments: list[str]) -> dict[str, bytes]:
    """Run the command line in this process; returns what has to repeat."""
    run_eval.main([*arguments, "--output-dir", str(output)])
    return results_of(output)


def results_of(output: Path) -> dict[str, bytes]:
    audio = {str(path.relative_to(output)): path.read_bytes() for path in sorted((output / "audio").rglob("*.wav"))}
    return {"summary.json": (output / "summary.json").read_bytes(), **audio}


@pytest.fixture(scope="module")
def uninterrupted(folder, offline) -> dict[str, bytes]:
    return evaluate_in(folder / "uninterrupted", [*offline, "--batch-size", "2"])


# The command line


def test_tables_have_every_row_and_figure(uninterrupted, folder):
    summary = json.loads(uninterrupted["summary.json"])
    assert list(summary["protocols"]) == ["continuation", "reference", "text"]
    expected = {
        "continuation": {"similarity_to_prompt", "similarity_of_new_speech_to_prompt", "similarity_to_original"},
        "reference": {"similarity_to_prompt", "similarity_to_original"},
        "text": {"similarity_to_original"},
    }
    for protocol, entry in summary["protocols"].items():
        assert entry["utterances"] == len(TEXTS)
        assert list(entry["rows"]) == ["Ground truth", "Codec resynthesis", "SLED, guidance 2"]
        row = entry["rows"]["SLED, guidance 2"]
        assert {name for name in row if name.startswith("similarity") and "interval" not in name} == expected[protocol]
        # Whisper's normalizer writes "two plus two" as "2 +2".
        assert row["reference_words"] == 24
        assert row["word_error_rate"] == pytest.approx(
            100 * (row["insertions"] + row["deletions"] + row["substitutions"]) / 24, abs=1e-4
        )
        assert row["failed"] == 0
    assert summary["speaker_encoder"]["same_speaker_pairs"] == 6
    timings = json.loads((folder / "uninterrupted" / "timings.json").read_text())
    assert set(timings["real_time_factor"]) == {f"{name}-guidance-2" for name in expected}
    assert timings["time_to_first_audio"]["utterances"] == 1
    assert timings["time_to_first_audio"]["median_seconds"] > 0


def test_report_shows_what_the_summary_holds(uninterrupted, folder):
    output = folder / "uninterrupted"
    report = (output / "report.md").read_text()
    summary = json.loads(uninterrupted["summary.json"])
    for protocol, entry in summary["protocols"].items():
        assert f"## {protocol.capitalize()}" in report
        for title, row in entry["rows"].items():
            assert f"| {title} | {row['word_error_rate']:.2f} [" in report
        for plot in ("error-by-length", "similarity", "worst"):
            assert (output / "plots" / f"{protocol}-{plot}.png").read_bytes().startswith(b"\x89PNG")
        page = (output / f"{protocol}.html").read_text()
        assert f'href="{protocol}.html"' in (output / "index.html").read_text()
        paths = [part.split('"')[0] for part in page.split('src="audio')[1:]]
        players = len(entry["rows"]) + (protocol != "text")
        assert len(paths) == players * len(TEXTS)
        assert all((output / f"audio{path}").is_file() for path in paths)


def test_synthesis_is_what_generate_gives_for_the_utterance_alone(uninterrupted, folder, corpus):
    from transformers import AutoProcessor

    from transformers_sled import SledForSpeechSynthesis

    model = SledForSpeechSynthesis.from_pretrained(folder / "offline", codec=str(GOLDEN / "codec")).eval()
    processor = AutoProcessor.from_pretrained(folder / "offline")
    generator = torch.Generator().manual_seed(utterance_seed(0, "u3"))
    inputs = processor(TEXTS[3], return_tensors="pt")
    expected = model.generate(**inputs, guidance_scale=2.0, generator=[generator])[0].numpy()
    path = folder / "uninterrupted" / "audio" / "text-guidance-2" / "000003-u3.wav"
    assert soundfile.read(path)[0] == pytest.approx(np.clip(expected, -1, 1), abs=2e-4)

    # A continuation is kept with its prompt as the codec has it, in front of what is new.
    prompt = SpeechDataset(corpus, 24_000).read_audio(3)[:4800]
    inputs = processor(TEXTS[3], prompt_audio=prompt, sampling_rate=24_000, return_tensors="pt")
    generator.manual_seed(utterance_seed(0, "u3"))
    expected = model.generate(**inputs, guidance_scale=2.0, generator=[generator])[0].numpy()
    path = folder / "uninterrupted" / "audio" / "continuation-guidance-2" / "000003-u3.wav"
    audio = soundfile.read(path)[0]
    assert audio[4800:] == pytest.approx(np.clip(expected, -1, 1), abs=2e-4)
    assert len(audio) == 4800 + len(expected)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_batch_size_does_not_change_the_speech(uninterrupted, folder, offline, batch_size):
    results = evaluate_in(
        folder / f"batch-{batch_size}", [*offline, "--protocols", "text", "--batch-size", str(batch_size)]
    )
    for name, content in results.items():
        if name.startswith("audio"):
            audio, expected = (soundfile.read(io.BytesIO(data))[0] for data in (content, uninterrupted[name]))
            assert audio == pytest.approx(expected, abs=2e-4)


def test_another_seed_gives_other_speech(uninterrupted, folder, offline):
    results = evaluate_in(folder / "seed", [*offline, "--protocols", "text", "--seed", "1", "--limit", "2"])
    assert all(results[name] != uninterrupted[name] for name in results if "text-guidance" in name)
    assert all(results[name] == uninterrupted[name] for name in results if "resynthesis" in name)


def test_without_noise_the_seed_does_not_matter(folder, offline):
    arguments = [*offline, "--protocols", "text", "--temperature", "0", "--limit", "2"]
    first, second = (evaluate_in(folder / f"still-{seed}", [*arguments, "--seed", seed]) for seed in "01")
    spoken = [name for name in first if "text-guidance" in name]
    assert len(spoken) == 2 and all(first[name] == second[name] for name in spoken)
    assert json.loads(first["summary.json"])["settings"]["temperature"] == 0


@pytest.mark.parametrize(
    ("settings", "ended_at_once", "never_ended"),
    [
        ({"eos_threshold": 1.0}, 0, len(TEXTS)),
        ({"eos_threshold": 0.0}, len(TEXTS), 0),
        # All but the first frame signal the end.
        ({"eos_threshold": 0.0, "min_new_tokens": 1}, 0, 0),
    ],
)
def test_speech_without_an_end_or_a_beginning_is_counted(
    tmp_path, corpus, judges, settings, ended_at_once, never_ended
):
    model = brief(tmp_path, "offline")
    edit_generation_config(tmp_path / "offline", **settings)
    arguments = [*model, *judges, "--dataset", corpus, "--prompt-seconds", "0.2", "--latency-utterances", "0"]
    results = evaluate_in(tmp_path / "run", [*arguments, "--protocols", "text"])
    row = json.loads(results["summary.json"])["protocols"]["text"]["rows"]["SLED, guidance 2"]
    assert (row["ended_at_once"], row["never_ended"]) == (ended_at_once, never_ended)
    report = (tmp_path / "run" / "report.md").read_text()
    assert ("ended at once" in report, "never ended" in report) == (bool(ended_at_once), bool(never_ended))


@pytest.mark.parametrize(
    ("settings", "unspoken", "too_long"),
    [
        # Without a text's end there are four seconds of speech, and half a second where it ends as soon as it may.
        ({"eos_threshold": 1.0, "max_new_tokens": 120}, 0, 3),
        ({"eos_threshold": 0.0, "min_new_tokens": 15}, 0, 0),
        ({"eos_threshold": 0.0, "min_new_tokens": 0}, 3, 0),
    ],
)
def test_short_texts_are_scored_by_voice(tmp_path, recognizer, capsys, monkeypatch, settings, unspoken, too_long):
    model = tmp_path / "model"
    shutil.copytree(builtin_voice(), model)
    for voice in (model / "voices").iterdir():
        if voice.name != "af_heart.safetensors":
            voice.unlink()
    edit_generation_config(model, **settings)
    monkeypatch.setattr(score_short_texts, "TEXTS", score_short_texts.TEXTS[:3])
    arguments = ["--model", str(model), "--recognizer", recognizer]
    score_short_texts.main(arguments)
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["af_heart", "all"]
    assert all((row["texts"], row["unspoken"], row["too_long"]) == (3, unspoken, too_long) for row in result.values())
    # Nothing is heard of what is not said.
    assert not unspoken or result["all"]["word_error_rate"] == 100
    shutil.rmtree(model / "voices")
    (model / "processor_config.json").write_text(
        json.dumps({**json.loads((model / "processor_config.json").read_text()), "default_voice": None})
    )
    with pytest.raises(SystemExit, match="has no named voices"):
        score_short_texts.main(arguments)


def test_missed_words_are_counted_by_their_frequency(uninterrupted, folder, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(folder / "uninterrupted" / "plan.json", results)
    # Training texts in which "dog" is 31 times, "night" once, and "barked" not at all.
    texts = write_dataset(tmp_path / "train.parquet", [{"text": "A dog."}] * 30 + [{"text": "The DOG, the night!"}])
    arguments = ["--results", str(results), "--texts", texts]
    with pytest.raises(SystemExit, match="has nothing that was recognized"):
        score_words.main(arguments)
    plan = json.loads((results / "plan.json").read_text())
    identifier = next(one["id"] for one in plan["utterances"] if one["text"] == "The dog barked all night.")
    heard = {"first": "the dog parked all night long", "second": "the dog barked at"}
    RecordStore(results / "records").append(
        "text", [{"system": system, "id": identifier, "text": text} for system, text in heard.items()]
    )
    score_words.main(arguments)
    assert json.loads(capsys.readouterr().out) == {
        "first": {
            "never": {"words": 2, "missed": 50.0},
            "1 to 3 times": {"words": 2, "missed": 0.0},
            "more often": {"words": 1, "missed": 0.0},
        },
        "second": {
            "never": {"words": 2, "missed": 50.0},
            "1 to 3 times": {"words": 2, "missed": 50.0},
            "more often": {"words": 1, "missed": 0.0},
        },
    }
    with pytest.raises(SystemExit, match=r"has no plan\.json"):
        score_words.main(["--results", str(tmp_path), "--texts", texts])
    with pytest.raises(SystemExit, match="matches no file"):
        score_words.main(["--results", str(results), "--texts", "missing.parquet"])


def test_interrupted_and_resumed_is_the_same(uninterrupted, tmp_path, offline, monkeypatch):
    """Twice stopped in the middle of writing a record, the last line cut short."""
    chance = random.Random(0)
    append = RecordStore.append

    def stop_after(count: int):
        def cut_short(store, stage, records):
            nonlocal count
            append(store, stage, records)
            count -= 1
            if count == 0:
                path = store.folder / f"{stage}.{store.process_index:05d}.jsonl"
                content = path.read_bytes()
                last = content.rstrip(b"\n").rfind(b"\n") + 1
                os.truncate(path, chance.randint(last, len(content) - 1))
                raise KeyboardInterrupt

        return cut_short

    arguments = [*offline, "--batch-size", "2"]
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(RecordStore, "append", stop_after(chance.randint(1, 40)))
            with pytest.raises(KeyboardInterrupt):
                evaluate_in(tmp_path / "run", arguments)
    assert evaluate_in(tmp_path / "run", arguments) == uninterrupted
    keys = [
        tuple(json.loads(line).get(name) for name in ("system", "id", "part"))
        for line in (tmp_path / "run" / "records" / "audio.00000.jsonl").read_text().splitlines()
    ]
    assert len(keys) == len(set(keys))


def command(output: Path, arguments: list[str]) -> list[str]:
    return [sys.executable, str(EVALUATION / "run_eval.py"), *arguments, "--output-dir", str(output)]


@pytest.mark.slow
def test_killed_twice_and_resumed_is_the_same(uninterrupted, tmp_path, offline):
    arguments = [*offline, "--batch-size", "2"]
    records = tmp_path / "records"
    for share in (0.3, 0.7):
        process = subprocess.Popen(command(tmp_path, arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = int(share * 33)
        while process.poll() is None:
            lines = sum(path.read_bytes().count(b"\n") for path in records.glob("audio.*.jsonl"))
            if lines >= wanted:
                break
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tmp_path, arguments), check=True, capture_output=True)
    assert results_of(tmp_path) == uninterrupted


@pytest.mark.slow
def test_two_processes_are_one(uninterrupted, tmp_path, offline):
    # On CPUs `accelerate launch` starts one process only, so its own launcher underneath is used.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*offline, "--batch-size", "2", "--cpu"]
    subprocess.run([*launch, *command(tmp_path, arguments)[1:]], check=True, capture_output=True)
    assert len(list((tmp_path / "records").glob("audio.*.jsonl"))) == 2
    assert results_of(tmp_path) == uninterrupted


def test_interleaved_model_streams_and_sweeps(tmp_path, folder, corpus, judges):
    model = brief(folder, "streaming")
    scales = ["--guidance-scales", "1.0", "1.5", "2.0", "--limit", "3", "--latency-utterances", "1"]
    results = evaluate_in(tmp_path, [*model, *judges, *scales, "--dataset", corpus])
    summary = json.loads(results["summary.json"])
    assert list(summary["protocols"]) == ["streaming"]
    rows = summary["protocols"]["streaming"]["rows"]
    assert [row["guidance_scale"] for row in rows.values()] == [None, None, 1.0, 1.5, 2.0]
    assert (tmp_path / "plots" / "streaming-guidance.png").is_file()


def test_without_a_model_the_ceiling_is_measured(tmp_path, corpus, judges):
    results = evaluate_in(tmp_path, ["--codec", str(GOLDEN / "codec"), *judges, "--dataset", corpus])
    rows = json.loads(results["summary.json"])["protocols"]["text"]["rows"]
    assert list(rows) == ["Ground truth", "Codec resynthesis"]


# What is refused


def refusal(capsys, tmp_path: Path, arguments: list[str]) -> str:
    """The message of a refused command line, which must leave no output behind."""
    with pytest.raises(SystemExit) as error:
        run_eval.main([*arguments, "--output-dir", str(tmp_path / "out")])
    assert not list((tmp_path / "out").rglob("*.wav"))
    return f"{error.value.code} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--recognizer", "nobody/listens"], "Recognizer 'nobody/listens' could not be loaded"),
        (["--recognizer", "faster-whisper:nobody"], "'faster-whisper:nobody' could not be loaded|needs the package"),
        (["--speaker-encoder", "nobody/speaks"], "Speaker encoder 'nobody/speaks' could not be loaded"),
        (["--model", "nobody/here"], "Model 'nobody/here' could not be loaded"),
        (["--dataset", "nothing.parquet"], "Data set 'nothing.parquet'"),
        (["--text-column", "sentence"], "no column sentence; name one of .*--text-column"),
        (["--speaker-column", "who"], "no column who; name one of .*--speaker-column"),
        (["--protocols", "streaming"], "streaming needs an interleaved model"),
        (["--prompt-seconds", "5"], "continuation leaves none of the 6 utterances.*not longer than the prompt"),
        (["--min-seconds", "5"], "No utterance between 5.0 and 10.0 s"),
        (["--min-seconds", "5", "--max-seconds", "4"], "hold no utterance"),
        (["--guidance-scales", "nan"], "guidance-scales has nan"),
        (["--batch-size", "0"], "batch-size is 0"),
        (["--prompt-seconds", "-1"], "prompt-seconds is -1"),
    ],
)
def test_bad_input_is_refused_before_any_work(capsys, tmp_path, offline, monkeypatch, changed, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search(message, refusal(capsys, tmp_path, [*offline, *changed]), re.DOTALL)


def test_processes_that_do_not_know_of_each_other_are_refused(capsys, tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were launched without accelerators; add --cpu" in refusal(capsys, tmp_path, offline)


def test_dnsmos_is_refused_where_it_is_not_installed(capsys, tmp_path, offline, monkeypatch):
    monkeypatch.setattr(run_eval.dnsmos, "find_spec", lambda name: None)
    assert "DNSMOS needs the package speechmos" in refusal(capsys, tmp_path, [*offline, "--dnsmos"])


def test_other_settings_do_not_mix_into_a_folder(uninterrupted, folder, offline):
    with pytest.raises(SystemExit, match="seed was 0"):
        evaluate_in(folder / "uninterrupted", [*offline, "--seed", "3"])


def test_reference_needs_a_second_utterance(capsys, tmp_path, offline):
    path = write_dataset(tmp_path / "alone.parquet", [{"speaker": name} for name in "abc"])
    arguments = [*offline, "--dataset", path, "--protocols", "reference"]
    assert "reference leaves none of the 3 utterances" in refusal(capsys, tmp_path, arguments)


# Data sets and protocols


def test_what_cannot_be_used_is_counted(tmp_path):
    rows = [
        {"seconds": 1.0},
        {"seconds": 0.5},  # at the lower bound: longer is wanted
        {"seconds": 2.0},  # at the upper bound: shorter is wanted
        {"text": "  ", "seconds": 1.0},
        {"content": b"RIFF of nothing", "seconds": 1.0},
        {"seconds": 1.5},
    ]
    dataset = SpeechDataset(write_dataset(tmp_path / "mixed.parquet", rows), 24_000)
    utterances, left_out = dataset.select(0.5, 2.0, progress=False)
    assert [utterance.id for utterance in utterances] == ["u0", "u5"]
    assert left_out == {"outside the length bounds": 2, "without text": 1, "unreadable audio": 1}


def test_repeated_ids_are_refused(tmp_path):
    path = write_dataset(tmp_path / "twice.parquet", [{"id": "x"}, {"id": "x"}])
    with pytest.raises(ValueError, match=r"more than once: \['x'\]"):
        SpeechDataset(path, 24_000).select(0.1, 2, progress=False)


def test_folder_of_audio_files_and_row_numbers_as_ids(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(0, 0.5))
    (tmp_path / "metadata.csv").write_text("file_name,text,speaker_id\na.wav,Hello there.,7\n")
    utterances, _ = SpeechDataset(str(tmp_path), 24_000).select(0.1, 2, progress=False)
    assert [(item.id, item.text, item.speaker, item.seconds) for item in utterances] == [
        ("0", "Hello there.", "7", 0.5)
    ]


def test_the_prompt_is_the_speakers_previous_utterance(tmp_path):
    rows = [{"speaker": name, "seconds": 0.3 + 0.1 * index} for index, name in enumerate("aabbbac")]
    dataset = SpeechDataset(write_dataset(tmp_path / "speakers.parquet", rows), 24_000)
    utterances, _ = dataset.select(0.1, 2, progress=False)
    pairs, left_out = pair_with_prompts("reference", utterances, 3.0)
    prompts = {utterance.id: source.id for utterance, source in pairs}
    # The first of a speaker takes the last; the lone one is left out.
    assert prompts == {"u0": "u5", "u1": "u0", "u5": "u1", "u2": "u4", "u3": "u2", "u4": "u3"}
    assert left_out == {"of a speaker with one utterance only": 1}
    pairs, left_out = pair_with_prompts("continuation", utterances, 0.5)
    assert all(utterance is source and utterance.seconds > 0.5 for utterance, source in pairs)
    assert left_out == {"not longer than the prompt of 0.5 s": 7 - len(pairs)}
    assert pair_with_prompts("text", utterances, 3.0) == ([(utterance, None) for utterance in utterances], {})


# Results on disk


def test_records_of_all_processes_are_read_and_a_cut_line_is_not(tmp_path):
    RecordStore(tmp_path, 0).append("text", [{"system": "s", "id": "a", "text": "é"}])
    RecordStore(tmp_path, 1).append("text", [{"system": "s", "id": "b", "text": ""}])
    with (tmp_path / "text.00001.jsonl").open("ab") as file:
        file.write(b'{"system": "s", "id": "c", "te')
    store = RecordStore(tmp_path, 1)
    assert list(store.read("text")) == [("s", "a"), ("s", "b")]
    store.append("text", [{"system": "s", "id": "c", "text": "x"}])
    assert [record["text"] for record in store.read("text").values()] == ["é", "", "x"]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_file(path, "first")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_file(path, "second")
    assert path.read_text() == "first"


def test_seeds_differ_by_utterance_and_by_run():
    seeds = {utterance_seed(seed, name) for seed in range(3) for name in ("a", "b", "1 a")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert utterance_seed(0, "a") == utterance_seed(0, "a")
