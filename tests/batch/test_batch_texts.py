"""Where the texts of a batch are read from, what is wrong with them, and which are spoken together."""

import datasets
import pytest

from transformers_sled.batch.texts import ROWS_PER_STREAM, TextRow, check_record, plan_batches, read_records


RECORDS = [
    {"id": "a", "text": "The dog barked.", "voice": "bf_emma", "seed": 3, "language": "en"},
    {"id": "b", "text": "She left,\nand slept.", "voice": None, "seed": None, "language": None},
]


def without_nothing(records):
    return [{name: value for name, value in record.items() if value is not None} for record in records]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "hub"])
def test_sources_give_the_same(kind, tmp_path, monkeypatch):
    dataset = datasets.Dataset.from_list([{**record, "extra": 1} for record in RECORDS])
    source = str(tmp_path / f"texts.{kind}")
    if kind == "parquet":
        dataset.to_parquet(source)
    elif kind == "csv":
        dataset.to_csv(source)
    elif kind == "jsonl":
        dataset.to_json(source)
    else:
        source = "someone/texts"
        monkeypatch.setattr("transformers_sled.batch.texts.load_dataset", lambda name, split: dataset)
    rows = [check_record(record, 1_000) for record in read_records(source)]
    assert rows == [check_record(record, 1_000) for record in RECORDS]
    assert rows[0] == TextRow("a", "The dog barked.", "bf_emma", 3, "en") and rows[1].error is None


@pytest.mark.parametrize(
    ("written", "seed"),
    [("3", 3), ("3.0", 3), ("9007199254740993", 2**53 + 1), ("", None), ("3.5", "error"), ("x", "error")],
)
def test_seeds_of_tables(tmp_path, written, seed):
    (tmp_path / "texts.csv").write_text(f"id,text,seed\na,Hello.,{written}\n")
    (record,) = read_records(str(tmp_path / "texts.csv"))
    row = check_record(record, 100)
    if seed == "error":
        assert "`seed` must be a whole number" in row.error
    else:
        assert row == check_record({"id": "a", "text": "Hello.", "seed": seed}, 100) and row.error is None
    assert check_record({"id": "a", "text": "Hello.", "seed": float("nan")}, 100).error is None


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "first.txt").write_text("One.\n\nTwo.")
    (tmp_path / "second.txt").write_text("Three.")
    (tmp_path / "notes.md").write_text("No text.")
    assert list(read_records(str(tmp_path))) == [
        {"id": "first", "text": "One.\n\nTwo."},
        {"id": "second", "text": "Three."},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts.jsonl", '{"id": 1}\n{"id": ', "Line 2"),
        ("texts.jsonl", "[]", "JSON object"),
        ("texts.doc", "", "must be a folder"),
        ("missing.csv", None, "does not exist"),
    ],
)
def test_sources_that_cannot_be_read(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 5}, "`text` must be a string"),
        ({"text": None}, "`text` must be a string"),
        ({"text": " \n"}, "`text` must not be empty"),
        ({"text": "x" * 101}, "at most 100 characters, got 101"),
        ({"text": "No\ud83d."}, "`text` must be Unicode"),
        ({"text": "No.", "voice": 3}, "`voice` must be a string"),
        ({"text": "No.", "voice": "\ud83d"}, "`voice` must be Unicode"),
        ({"text": "No.", "language": 3}, "`language` must be a string"),
        ({"text": "No.", "seed": -1}, "`seed` must be a whole number"),
        ({"text": "No.", "seed": "one"}, "`seed` must be a whole number"),
        ({"text": "No.", "seed": True}, "`seed` must be a whole number"),
    ],
)
def test_bad_rows_are_rows_with_an_error(record, message):
    row = check_record({"id": 7, **record}, 100)
    assert row.id == "7" and message in (row.error or "")


@pytest.mark.parametrize("name", [None, "", True, 1.5, "\ud83d"])
def test_a_row_needs_an_id(name):
    with pytest.raises(ValueError, match="`id` must be"):
        check_record({"id": name, "text": "No."}, 100)


def test_seeds_follow_from_ids():
    rows = [
        check_record({"id": name, "text": text}, 100) for name, text in (("a", "No."), ("b", "No."), ("a", "Yes."))
    ]
    assert rows[0].seed == rows[2].seed != rows[1].seed


def test_batches_are_sorted_by_length_and_do_not_depend_on_the_order():
    rows = [TextRow(str(number), "x" * (number % 7 + 1)) for number in range(50)]
    plan = plan_batches(rows, max_streams=2)
    assert plan == plan_batches(rows[::-1], max_streams=2)
    batches = [[row["text"] for row in batch] for batch in plan["rows"].to_pylist()]
    assert all(len(batch) <= 2 * ROWS_PER_STREAM for batch in batches)
    lengths = [len(text) for batch in batches for text in batch]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 50
    assert len(set(plan["batch"].to_pylist())) == len(batches)


def test_a_long_text_is_a_batch_of_its_own():
    rows = [TextRow("long", "x" * 100_000), TextRow("longer", "x" * 200_000), TextRow("short", "x")]
    sizes = [len(batch) for batch in plan_batches(rows, max_streams=8)["rows"].to_pylist()]
    assert sizes == [1, 1, 1]


def test_an_id_is_there_once():
    with pytest.raises(ValueError, match="'a' is there twice"):
        plan_batches([TextRow("a", "No."), TextRow("a", "Yes.")], max_streams=2)
    with pytest.raises(ValueError, match="no rows"):
        plan_batches([], max_streams=2)
