"""Several utterances by one speaker as one: their text, codes, alignments and pauses."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from example_runner import run_example
from transformers_sled.text_sled import encode_text
from transformers_sled.training import join_utterances, load_source


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


@pytest.fixture
def join(data, tmp_path):
    def run(folder=data, output_dir=tmp_path / "joined", num_joined=5, **changes):
        if "alignments" in changes:
            changes["alignments"] = load_source(str(changes["alignments"]))
            changes["tokenizer"] = AutoTokenizer.from_pretrained(GOLDEN / "offline")
        join_utterances(folder, output_dir, num_joined=num_joined, **changes)
        return output_dir

    return run


def split_id(name):
    """Ids of the utterances that were joined."""
    return [f"u+{part}" for part in name.removeprefix("u+").split("+u+")]


def read_column(path, name):
    table = load_source(str(path))
    return dict(zip(table["id"][:], table[name][:], strict=True))


def test_joined_utterances_are_one_speaker_saying_one_after_the_other(data, join):
    rows = {row["id"]: row for row in load_source(str(data))}
    joined = list(load_source(str(join(max_utterances=3, num_joined=12))))
    assert joined[:8] == list(rows.values())
    assert len({row["id"] for row in joined}) == len(joined) == 8 + 12
    assert {len(split_id(row["id"])) for row in joined[8:]} == {2, 3}
    for row in joined[8:]:
        parts = [rows[name] for name in split_id(row["id"])]
        assert len({part["id"] for part in parts}) == len(parts)
        assert {part["speaker"] for part in parts} == {row["speaker"]}
        assert row["text"] == " ".join(part["text"] for part in parts)
        assert row["length"] == sum(part["length"] for part in parts)
        assert row["duration"] == pytest.approx(sum(part["duration"] for part in parts))
        assert np.array_equal(row["audio_codes"], np.concatenate([part["audio_codes"] for part in parts], axis=1))


def test_joined_utterances_are_not_longer_than_asked_for(join):
    joined = load_source(str(join(num_joined=100, max_frames=94)))
    assert len(joined) > 8 and max(joined["length"][:]) <= 94


def test_favored_speakers_are_joined_more_often(join):
    joined = list(load_source(str(join(favored_speakers=["b"], favored_share=1.0))))
    assert {row["speaker"] for row in joined[8:]} == {"b"}


def test_a_share_ends_in_short_utterances(data, join):
    lengths = {row["id"]: row["length"] for row in load_source(str(data))}
    shortest = min(lengths.values())
    joined = list(load_source(str(join(num_joined=4, short_frames=shortest, short_share=1.0))))[8:]
    speakers = {row["speaker"] for row in load_source(str(data)) if row["length"] == shortest}
    ends = [lengths[split_id(row["id"])[-1]] for row in joined if row["speaker"] in speakers]
    assert ends and set(ends) == {shortest}
    assert all(len(split_id(row["id"])) == len(set(split_id(row["id"]))) for row in joined)


def test_the_command_joins_alignments_as_well(data, alignments, checkpoint, tmp_path, capsys):
    folder = tmp_path / "joined"
    words = ["--dataset", data, "--output-dir", folder, "--num-joined", 5]
    run_example("tiny_voice/join_utterances.py", *words, alignments=alignments, tokenizer=checkpoint)
    assert capsys.readouterr().out.strip() == f"{folder}: 8 utterances and 5 joined"
    paths = read_column(folder / "alignments.parquet", "alignment")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = {row["id"]: row for row in load_source(str(folder))}
    assert paths.keys() == rows.keys() and len(rows) == 8 + 5
    for name in list(rows)[8:]:
        first, *_, last = split_id(name)
        assert len(paths[name]) == rows[name]["length"]
        assert paths[name][: len(paths[first])] == paths[first]
        tokens, parts = encode_text(tokenizer, rows[name]["text"]), encode_text(tokenizer, rows[last]["text"])
        # What is spoken in the last frames is counted from the end of the text.
        assert [len(tokens) - index for index in paths[name][-len(paths[last]) :]] == [
            len(parts) - index for index in paths[last]
        ]
        assert paths[name] == sorted(paths[name]) and paths[name][-1] == len(tokens) - 1


def test_phonemes_go_with_the_alignments(join, alignments, alignments_with_phonemes):
    assert read_column(alignments_with_phonemes, "alignment") == read_column(alignments, "alignment")
    folder = join(alignments=alignments_with_phonemes, pause=(100, 100))
    table = load_source(str(folder / "alignments.parquet"))
    assert table.features["phonemes"].feature.names == ["sil", "a", "b"]
    phonemes = read_column(folder / "alignments.parquet", "phonemes")
    lengths = {row["id"]: row["length"] for row in load_source(str(folder))}
    assert {name: len(row) for name, row in phonemes.items()} == lengths
    # 75 frames a second: the middle of the 19th is nearer to the label of the first quarter of a second than to another.
    assert phonemes["u+0"][:19] == 18 * [0] + [1]
    for name in list(phonemes)[8:]:
        assert phonemes[name] == [phoneme for part in split_id(name) for phoneme in phonemes[part]]


def test_silence_between_utterances_is_cut_to_a_pause(join, alignments_with_phonemes):
    folder = join(alignments=alignments_with_phonemes, pause=(5, 5))
    phonemes = read_column(folder / "alignments.parquet", "phonemes")
    rows = {row["id"]: row for row in load_source(str(folder))}
    for name in list(rows)[8:]:
        parts = split_id(name)
        # Every utterance has 18 frames of silence at its start and none at its end.
        assert rows[name]["length"] == sum(rows[part]["length"] for part in parts) - 13 * (len(parts) - 1)
        assert len(phonemes[name]) == rows[name]["length"] == len(rows[name]["audio_codes"][0])
        start = rows[parts[0]]["length"]
        assert phonemes[name][start - 1 : start + 6] == [phonemes[parts[0]][-1], 0, 0, 0, 0, 0, 1]
        assert rows[name]["audio_codes"][0][start] == rows[parts[1]]["audio_codes"][0][13]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_frames": 50}, "has two utterances of 50 frames together"),
        ({"max_utterances": 1}, "`max_utterances` must be at least 2, got 1"),
        ({"short_share": 1.5}, "`short_share` must be between 0 and 1, got 1.5"),
        ({"pause": (9, 3)}, r"`pause` must be two numbers from 0 on, the shorter one first, got \(9, 3\)"),
        ({"favored_speakers": ["a", "z"]}, "which has no z"),
        ({"folder": GOLDEN}, "was not written by prepare_data.py"),
        ({"output_dir": GOLDEN}, "is already there"),
        ({"tokenizer": "given"}, "`alignments` and `tokenizer` need each other"),
    ],
)
def test_what_cannot_be_joined_is_refused(join, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        join(**changed)
    assert not (tmp_path / "joined").exists()


def test_alignments_of_other_utterances_are_refused(join, tmp_path):
    datasets.Dataset.from_dict({"id": ["other"], "alignment": [[0]]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has no utterances of those that are joined"):
        join(alignments=tmp_path / "other.parquet")
    assert not (tmp_path / "joined").exists()
