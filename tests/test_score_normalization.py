"""The score of hard lines: exact matches, what is wrong, and files that hold no lines."""

import json
import sys
from pathlib import Path

import pytest


pytest.importorskip("jiwer")

from transformers_sled import SledProcessor, builtin_voice


EVALUATION = Path(__file__).parents[1] / "evaluation"
sys.path.insert(0, str(EVALUATION))

import score_normalization  # noqa: E402


def test_lines_are_scored_one_by_one(tmp_path, capsys):
    lines = [
        {"kind": "money", "text": "It costs $3.50.", "read": "It costs three dollars and fifty cents."},
        {"kind": "money", "text": "It costs $2.", "read": "It costs two bucks."},
        {"kind": "year", "text": "In 1994.", "read": "In nineteen ninety-four."},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    score_normalization.main(["--lines", str(path)])
    result = json.loads(capsys.readouterr().out)
    assert result["by_kind"] == {"money": "1/2", "year": "1/1"} and round(result["exact_percent"]) == 67
    assert result["wrong"] == [{**lines[1], "is_read": "It costs two dollars."}]


def test_lines_that_were_kept_aside():
    lines = score_normalization.load_lines(EVALUATION / "data" / "hard_lines_held_out.jsonl")
    processor = SledProcessor.from_pretrained(builtin_voice(), normalizer="en")
    assert len(lines) == 60 and score_normalization.score_text(processor, lines)["exact_percent"] >= 95


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"kind": "year", "text": "In 1994."}'])
def test_files_without_lines(tmp_path, content):
    path = tmp_path / "lines.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit, match="`lines`"):
        score_normalization.main(["--lines", str(path)])
