"""Bad input of every command in `examples/` is told in one line."""

import ast

import datasets
import pytest

from example_runner import EXAMPLES, run_example
from transformers_sled.training import run_command


SCRIPTS = sorted(
    str(path.relative_to(EXAMPLES)) for folder in (EXAMPLES, EXAMPLES / "tiny_voice") for path in folder.glob("*.py")
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the commands run: a table without what they need, a file that is none, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.Dataset.from_dict({"id": ["1"], "words": ["Stop."]}).to_parquet("table.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "recipe.yaml").write_text("- not: a recipe\n")
    return tmp_path


def fail(capsys, script, *words):
    """The last line of what a command that must fail says."""
    with pytest.raises(SystemExit) as error:
        run_example(script, *words)
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and "Traceback" not in "".join(lines)
    return lines[-1]


CODEC = EXAMPLES / "tiny_voice" / "codec"
FILES = ["--train_files", "missing.parquet", "--output_dir", "out"]
LATENTS = ["--codec", CODEC, "--output_dir", "out"]
BAD_INPUT = [
    ("ablation.py", ["--dataset_name", "table.parquet", "--output_dir", "out"], "--tokenizer_name is needed"),
    ("clone_voice.py", ["a", "--voice", "b", "--model", "./missing"], "missing"),
    ("prepare_data.py", ["--output_dir", "out"], "Give either --manifest or --dataset"),
    ("prepare_data.py", ["--dataset", "missing.csv", "--output_dir", "out"], "`path` 'missing.csv' matches no file"),
    ("prepare_data.py", ["--dataset", "table.parquet", "--codec", CODEC, "--output_dir", "out", "--bandwidth", "2.4"],
     "`text_column` must be one of the columns"),
    ("prepare_data.py", ["--dataset", "table.parquet", "--codec", "./missing", "--output_dir", "out"], "missing"),
    ("prepare_data.py", ["--manifest", "missing.jsonl", "--output_dir", "out"], "missing.jsonl"),
    ("stream_speech.py", ["--model", "./missing", "--output", "a.wav"], "missing"),
    ("synthesize.py", ["a", "--model", "./missing"], "missing"),
    ("synthesize.py", ["--text-file", "missing.txt"], "missing.txt"),
    ("train_codec.py", ["--config_name", CODEC, *FILES], "matches no file"),
    ("train_codec.py", ["--config_name", "./missing", *FILES], "missing"),
    ("train_codec.py", ["--config_name", CODEC, "--train_files", "table.parquet", "--output_dir", "out"],
     "`audio_column_name` is 'audio'"),
    ("train_sled.py", ["--dataset_name", "x", "--output_dir", "out", "--model_name_or_path", "./missing"], "missing"),
    ("train_sled.py", ["missing.yaml", "--output_dir", "out"], "missing.yaml"),
    ("train_sled.py", ["recipe.yaml", "--output_dir", "out"], "recipe.yaml must hold arguments by name"),
    ("train_sled.py", ["--dataset_name", "x", "--output_dir", "out", "--learning_rte", "1"], "--learning_rte"),
    ("train_tokenizer.py", ["--dataset", "broken.parquet", "--output_dir", "out"], "broken.parquet cannot be read"),
    ("train_tokenizer.py", ["--dataset", "table.parquet", "--output_dir", "out"], "--text_column must be one of"),
    ("train_tokenizer.py", ["--text_files", "missing.txt", "--output_dir", "out"], "missing.txt"),
    ("tiny_voice/align_text.py",
     ["--dataset", "table.parquet", "--tokenizer", CODEC.parents[2] / "tests/fixtures/golden/offline", "--codec", CODEC, "--output", "a"],
     "must have columns id, text, audio_codes"),
    ("tiny_voice/change_codec.py",
     ["--model", "./missing", "--codec", CODEC, "--train-files", "table.parquet", "--output-dir", "out"], "missing"),
    ("tiny_voice/join_utterances.py", ["--dataset", "missing", "--output-dir", "out"], "was not written by prepare_data.py"),
    ("tiny_voice/label_speech.py", ["--dataset", "missing.parquet", "--output", "labels.parquet"], "matches no file"),
    ("tiny_voice/make_speech.py",
     ["--texts", "a.txt", "--model", "a", "--vocabulary", "b", "--voices", "c", "--speakers", "d", "--output", "e"], "is not "),
    ("tiny_voice/package_voice.py", ["--model", "./missing", "--output-dir", "out"], "missing"),
    ("tiny_voice/train_aligned.py",
     ["--alignments", "a", "--dataset_name", "b", "--tokenizer_name", "./missing", "--output_dir", "out"], "missing"),
    ("tiny_voice/train_decoder.py", ["--config_name", "./missing", "--train_files", "table.parquet", *LATENTS], "missing"),
    ("tiny_voice/train_encoder.py", ["--config_name", CODEC, "--train_files", "missing.parquet", *LATENTS], "matches no file"),
    ("tiny_voice/train_latents.py",
     ["--config_name", CODEC, "--train_files", "table.parquet", "--labels", "table.parquet", "--output_dir", "out"],
     "table.parquet must have columns id, phonemes, pitch"),
    ("tiny_voice/write_texts.py", ["--wordnet", "missing", "--output", "texts.txt"], "must have WordNet's files"),
    ("tiny_voice/write_texts.py",
     ["--wordnet", "missing", "--output", "texts.txt", "--unheard", "4"], "--unheard and --known need each other"),
    ("tiny_voice/write_texts.py",
     ["--wordnet", "missing", "--output", "texts.txt", "--short", "4", "--exclude", "a"], "--exclude is for texts of every kind"),
    ("tiny_voice/write_texts.py",
     ["--wordnet", "missing", "--output", "texts.txt", "--short", "4", "--per-kind", "8"], "not allowed with argument"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "words", "message"), BAD_INPUT)
def test_bad_input_gets_one_line(script, words, message, capsys):
    line = fail(capsys, script, *words)
    assert line.startswith(f"{script.split('/')[-1]}: error: ") or line.startswith(f"{script}: error: ")
    assert message in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_run_that_way(script):
    tree = ast.parse((EXAMPLES / script).read_text())
    last = ast.unparse(tree.body[-1])
    assert "run_command(main)" in last


def test_other_errors_are_not_hidden():
    def divide():
        _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        run_command(divide)
