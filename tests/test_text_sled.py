"""From text to token ids: words, parts, tokenization of text as it arrives, and the errors that bad text gets."""

import doctest
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as explicit_example
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast, RobertaTokenizer

from transformers_sled import SledProcessor, normalization_sled, text_sled
from transformers_sled.text_sled import (
    TEXT_BYTES_PER_SECOND,
    SledIncrementalTokenizer,
    SledTextReader,
    SledTextSource,
    encode_text,
)


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
TOKENIZERS = ["offline", "streaming", "trained"]
CONTROL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def split(length: int, cuts: list[int]) -> list[slice]:
    """Portions of `length` characters with cuts at any positions; equal cuts make empty portions."""
    bounds = [0, *sorted(cut % (length + 1) for cut in cuts), length]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


# Tokenization


# What the pre-tokenizer treats in its own way, and characters of every kind.
FRAGMENTS = [
    *["'", "'s", "'r", "'re", "'l", "'ll", "'v", "'ve", "''", " '", "s", "e", "l"],
    *[" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\u200b"],
    *["Hello", "don't", "12", "½", ".", "...", "!?", "e\u0301", "ß", "日本", "👩‍👧", "\u200d", "\x00", "\ufeff"],
    *CONTROL_TOKENS,
]


@functools.cache
def load_tokenizer(name: str) -> RobertaTokenizer:
    if name != "trained":
        return RobertaTokenizer.from_pretrained(GOLDEN / name)
    # One that has a token of its own for every word below, so that no cut between words goes unnoticed.
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([first + second for first in FRAGMENTS for second in FRAGMENTS], trainer)
    model = json.loads(words.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def tokenize_by_pieces(tokenizer, text: str, cuts: list[int]) -> list[int]:
    incremental = SledIncrementalTokenizer(tokenizer)
    ids: list[int] = []
    for piece in split(len(text), cuts):
        ids += incremental.push(text[piece])
    return ids + incremental.finish()


UNICODE_TEXT = st.lists(
    st.sampled_from(FRAGMENTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=14
).map("".join)


@settings(deadline=None, max_examples=200)
@given(text=UNICODE_TEXT, cuts=st.lists(st.integers(0, 60), max_size=30), name=st.sampled_from(TOKENIZERS))
def test_pieces_give_the_ids_of_the_whole_text(text, cuts, name):
    tokenizer = load_tokenizer(name)
    expected = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenize_by_pieces(tokenizer, text, cuts) == expected
    assert encode_text(tokenizer, text) == expected
    assert encode_text(tokenizer, text, add_special_tokens=False) == expected[1:-1]


@settings(deadline=None, max_examples=200)
@given(text=UNICODE_TEXT, continuation=UNICODE_TEXT)
def test_released_ids_are_final_and_early(text, continuation):
    tokenizer = load_tokenizer("trained")
    incremental = SledIncrementalTokenizer(tokenizer)
    released = [token_id for character in text for token_id in incremental.push(character)]
    # Final: they begin the ids of the text, however it goes on.
    assert encode_text(tokenizer, text + continuation)[: len(released)] == released
    # Early: nothing is held back but the last word, or an apostrophe and the letter of a possible contraction after it.
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    num_held = 2 if [word for word, _ in words][-2:-1] == ["'"] else 1
    end = words[-num_held][1][0] if len(words) >= num_held else 0
    complete = encode_text(tokenizer, text[:end].rstrip(" "), add_special_tokens=False)
    assert len(released) >= len(complete)


def test_a_word_is_released_when_the_next_begins():
    tokenizer = load_tokenizer("streaming")
    incremental = SledIncrementalTokenizer(tokenizer)
    pieces = ["The", " ", "dog", "'", "s", " bar", "ked", ".", ""]
    tokens = [tokenizer.convert_ids_to_tokens(incremental.push(piece)) for piece in pieces]
    words = [tokenizer.convert_tokens_to_string(token) for token in tokens]
    assert words == ["", "<s>The", "", " dog", "'s", "", "", " barked", ""]
    assert tokenizer.convert_ids_to_tokens(incremental.finish()) == [".", "</s>"]


def test_empty_text():
    tokenizer = load_tokenizer("streaming")
    incremental = SledIncrementalTokenizer(tokenizer)
    assert incremental.push("") == []
    assert incremental.finish() == tokenizer("")["input_ids"] == [0, 2]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("token", CONTROL_TOKENS)
@pytest.mark.parametrize("template", ["{}", "a {} b", "a   {}", "{}{}"])
def test_control_tokens_in_text_are_plain_characters(name, token, template):
    tokenizer = load_tokenizer(name)
    text = template.format(token, token)
    assert not set(encode_text(tokenizer, text, add_special_tokens=False)) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(encode_text(tokenizer, text), skip_special_tokens=True) == text
    assert tokenize_by_pieces(tokenizer, text, list(range(len(text)))) == encode_text(tokenizer, text)


def with_normalizer():
    tokenizer = RobertaTokenizer.from_pretrained(GOLDEN / "streaming")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def with_added_word():
    tokenizer = RobertaTokenizer.from_pretrained(GOLDEN / "streaming")
    tokenizer.add_tokens([AddedToken("the dog", normalized=False)])
    return tokenizer


def word_level():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "dog": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize(
    "make_tokenizer",
    [
        lambda: RobertaTokenizer.from_pretrained(GOLDEN / "streaming", add_prefix_space=True),
        with_normalizer,
        with_added_word,
        word_level,
    ],
    ids=["add_prefix_space", "normalizer", "added word", "word level"],
)
def test_other_tokenizers_give_their_ids_at_the_end(make_tokenizer):
    tokenizer = make_tokenizer()
    text = "the dog, the do\ufb01 e\u0301 </s>"
    incremental = SledIncrementalTokenizer(tokenizer)
    assert [incremental.push(character) for character in text] == [[]] * len(text)
    assert incremental.finish() == tokenizer(text, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("piece", [None, b"dog", 3, ["dog"], "\ud83d"])
def test_bad_pieces(piece):
    tokenizer = load_tokenizer("streaming")
    incremental = SledIncrementalTokenizer(tokenizer)
    with pytest.raises(ValueError, match="`piece`"):
        incremental.push(piece)
    with pytest.raises(ValueError, match="`text`"):
        encode_text(tokenizer, piece)
    # The bad piece is not part of the text.
    assert incremental.push("dog ") + incremental.finish() == encode_text(tokenizer, "dog ")


def test_no_text_after_the_end():
    incremental = SledIncrementalTokenizer(load_tokenizer("streaming"))
    incremental.finish()
    for call in (lambda: incremental.push("a"), incremental.finish):
        with pytest.raises(RuntimeError, match="finished"):
            call()


# Parts


LIMITS = [(2048, None), (400, None), (220, None), (2048, 6.0), (2048, 2.0), (300, 3.0), (240, 1.5)]
SENTENCES = [
    *[
        "The dog barked all night.",
        "No.",
        "Is it?",
        "Dr. Smith saw it at 5 p.m. today.",
        "Yes!",
        "今日は雨です。",
        "...",
        "- -",
    ],
    *["She opened the window, looked at the garden, and wondered what the old man had wanted from them that night."],
    *[
        "word " * 30,
        "wordwordword" * 12,
        "One, two; three - four and five",
        'He said, "Stop. Go." Then he left.',
        "\n\n",
        " \n \n",
        "\n",
    ],
]
WRITTEN = st.lists(st.sampled_from(SENTENCES) | st.text(max_size=6), min_size=1, max_size=12).flatmap(
    lambda sentences: st.sampled_from(["", " ", "  "]).map(lambda space: space.join(sentences))
)
CUTS = st.lists(st.integers(0, 2000), max_size=20)


@functools.cache
def load_processor(
    num_positions: int = 2048, max_part_seconds: float | None = None, side: str = "streaming", **kwargs
):
    processor = SledProcessor.from_pretrained(GOLDEN / side)
    return SledProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        max_position_embeddings=num_positions,
        max_part_seconds=max_part_seconds,
        **kwargs,
    )


def read_by_pieces(source: SledTextSource, text: str, cuts: list[int]) -> list[list[int]]:
    """Ids of the parts of a text cut anywhere. They grow in place and are never taken back."""
    seen: list[tuple[list[int], list[int]]] = []
    for piece in split(len(text), cuts):
        source.push(text[piece])
        assert all(part.is_complete for part in source.parts[:-1])
        for number, part in enumerate(source.parts):
            if number == len(seen):
                seen.append((part.ids, []))
            ids, earlier = seen[number]
            assert part.ids is ids and ids[: len(earlier)] == earlier
            seen[number] = ids, list(ids)
    source.finish()
    assert source.is_finished and all(part.is_complete for part in source.parts)
    return [part.ids for part in source.parts]


@explicit_example(
    text="Yes!Yes!Yes!00\U00012f900\u00b0", cuts=[], limits=(220, None), is_interleaved=True, prompt=(None, 0)
)
@settings(deadline=None, max_examples=150)
@given(
    text=WRITTEN,
    cuts=CUTS,
    limits=st.sampled_from(LIMITS),
    is_interleaved=st.booleans(),
    prompt=st.sampled_from([(None, 0), ("Two plus two.", 10), (None, 12)]),
)
def test_whole_text_and_pieces_have_the_same_parts(text, cuts, limits, is_interleaved, prompt):
    processor = load_processor(*limits)
    prompt_text, num_prompt_frames = prompt
    source = SledTextSource(processor, prompt_text, num_prompt_frames, is_interleaved)
    try:
        parts = processor.split_text(text, num_prompt_frames, prompt_text)
    except ValueError as error:
        assert "nothing to say" in str(error)
        with pytest.raises(ValueError, match="`text`"):
            read_by_pieces(source, text, cuts)
        return
    assert read_by_pieces(source, text, cuts) == [encode_text(processor.tokenizer, part) for part in parts]
    # Nothing is lost but marks that say nothing.
    assert all(part.startswith(prompt_text or "") for part in parts)
    own = [part.removeprefix(prompt_text or "") for part in parts]
    assert "".join(filter(str.isalnum, "".join(own))) == "".join(filter(str.isalnum, processor.normalize(text)))
    num_positions, max_part_seconds = limits
    for number, part in enumerate(parts):
        frames = num_prompt_frames if number == 0 or prompt_text else 0
        # Marks that go to the word before them do not count.
        num_marks = sum(character in ".,;:!?" for character in part)
        assert processor.estimate_num_positions(part, frames) - 7 * num_marks <= num_positions
        if max_part_seconds is not None:
            assert (len(own[number].encode()) - num_marks) / TEXT_BYTES_PER_SECOND <= max_part_seconds


def test_parts_are_whole_sentences():
    processor = load_processor(max_part_seconds=6.0)
    text = "It was late. The dog barked all night. She opened the window and looked at the garden. No. Nobody left."
    assert processor.split_text(text) == [
        "It was late. The dog barked all night.",
        " She opened the window and looked at the garden.",
        " No. Nobody left.",
    ]


def test_a_sentence_too_long_is_cut_at_clauses_then_words_then_anywhere():
    processor = load_processor(max_part_seconds=3.0)
    text = "When the rain had stopped at last, they walked along the river until they reached the old stone bridge"
    assert processor.split_text(text) == [
        "When the rain had stopped at last,",
        " they walked along the river",
        " until they reached the old stone bridge",
    ]
    parts = processor.split_text("they walked along the river to reach the very old stone bridge")
    assert parts == ["they walked along the river to reach the", " very old stone bridge"]
    parts = processor.split_text("wa" * 100)
    assert "".join(parts) == "wa" * 100 and max(map(len, parts)) == 40


def test_a_blank_line_ends_a_part():
    for limits in LIMITS[:5]:
        assert load_processor(*limits).split_text("It is late\r\n \r\nThe dog\nbarked.") == [
            "It is late",
            " The dog barked.",
        ]


def test_the_first_part_starts_before_its_sentence_ends():
    source = SledTextSource(load_processor(max_part_seconds=6.0))
    source.push("The dog bar")
    assert source.parts[0].ids == encode_text(source_tokenizer := load_processor().tokenizer, "The dog")[:-1]
    # Nothing that has arrived as a whole word waits.
    source.push("ked all night and")
    assert source.parts[0].ids == encode_text(source_tokenizer, "The dog barked all night")[:-1]
    source.push(" slept at noon. ")
    assert not source.parts[0].is_complete
    # A part that is primed with the one before it comes as a whole.
    source.push("No one saw it ")
    assert source.parts[0].is_complete and len(source.parts) == 1
    source.finish()
    assert [part.is_complete for part in source.parts] == [True, True]


def test_later_parts_start_early_where_each_begins_with_the_voice_prompt():
    processor = load_processor(max_part_seconds=3.0)
    source = SledTextSource(processor, "Two plus two.", 30)
    source.push("The dog barked all night. She opened the win")
    assert [part.is_complete for part in source.parts] == [True, False]
    assert source.parts[1].ids == encode_text(processor.tokenizer, "Two plus two. She opened the")[:-1]


def test_a_prompt_without_room_is_refused():
    processor = load_processor(400)
    for read in (processor.split_text, lambda *arguments: SledTextSource(processor, arguments[2], arguments[1])):
        with pytest.raises(ValueError, match="voice prompt of 390 frames"):
            read("Hello there.", 390, "Two plus two.")


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_sources_without_end(is_interleaved, monkeypatch):
    monkeypatch.setattr(text_sled, "MAX_WAITING_CHARACTERS", 50_000)
    for piece in ("", " " * 1000, "." * 1000, *([] if is_interleaved else ["word " * 1000])):
        source = SledTextSource(load_processor(), is_interleaved=is_interleaved)
        with pytest.raises(ValueError, match="`text` is still going on"):
            for _ in range(60_000):
                source.push(piece)


def test_an_interleaved_source_counts_what_waits_and_no_more(monkeypatch):
    monkeypatch.setattr(text_sled, "MAX_WAITING_CHARACTERS", 100)
    source = SledTextSource(load_processor())
    for _ in range(100):
        source.push("word " + " " * 90)
    with pytest.raises(ValueError, match="`text` is still going on"):
        source.push(" " * 101)


@pytest.mark.parametrize("piece", [None, b"dog", 3, ["dog"], "\ud83d"])
def test_bad_pieces_of_a_source(piece):
    with pytest.raises(ValueError, match="`text`"):
        SledTextSource(load_processor()).push(piece)


@pytest.mark.parametrize("pieces", [[], [""], [" ", "\n"], ["...", "?!"]])
def test_a_source_with_nothing_to_say(pieces):
    source = SledTextSource(load_processor())
    for piece in pieces:
        source.push(piece)
    with pytest.raises(ValueError, match="`text`"):
        source.finish()


# Cleaning


def clean(text: str, cuts: list[int] = (), **kwargs) -> str:
    reader = SledTextReader(**kwargs)
    words = [word for piece in split(len(text), cuts) for word in reader.push(text[piece])]
    return "".join(words + reader.finish())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The\tdog \u00a0barked\u3000all\u2009night.\r\n", "The dog barked all night."),
        ("\ufeffThe\u200b d\u00ado\u2060g\u200f \x00bark\x07ed.", "The dog barked."),
        ("It is late.\r\n\r\nThe dog\nbarked.\u2029Yes.", "It is late.\n\nThe dog barked.\n\nYes."),
        ("cafe\u0301 \ufb01ne \U0001d407\U0001d41e \uff21\uff11", "café fine He A1"),
        ("\u201cWell\u2026\u201d she said, \u2018no\u2019. Don\u2019t!", "\"Well...\" she said, 'no'. Don't!"),
        ("A dog \u2014 a big one\u2014barked -- twice - here", "A dog, a big one, barked, twice, here"),
        ("1990\u20131995, New York\u2013London, \u22125, well-known", "1990-1995, New York-London, -5, well-known"),
        ("Hi\U0001f44bthere \U0001f469\u200d\U0001f469\u200d\U0001f467 1\ufe0f\u20e3 \u2192 \u2665 \U0001f1e9\U0001f1ea.", "Hi there 1."),
        ("What?!?! No!!!! **Now** and _then_.....", "What? No! Now and then..."),
        ("THE DOG BARKED. SHE DIDN'T HEAR IT.", "The dog barked. She didn't hear it."),
        ("He works for NASA and the FBI. I said NO.", "He works for NASA and the FBI. I said no."),
        ("PLEASE CALL THE FBI, CHAPTER IV", "Please call the FBI, chapter IV"),
        ("<speak><s>The dog.</s> <p>A &amp; B</p><break time='1s'/>Yes.</speak>", "The dog.\n\nA & B\n\nYes."),
        ("say </s> now <pad>, <mask> and <b>bold</b>", "say </s> now <pad>, <mask> and <b>bold</b>"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("... \u2014 ?! \U0001f600", ""),
    ],
)  # fmt: skip
def test_cleaning(text, expected):
    assert clean(text) == expected
    assert clean(expected) == expected


DIRT = [
    *[" ", "\n", "\r", "\r\n", "\t", "\u2028", "\u200b", "\ufeff", "\u200d", "\u00ad", "\x00", "\u0301", "e\u0301", "\u2014", "--", "-", "\u2013"],
    *["\u2026", "..", "!?", "'", "''", "\u201c", "*", "_", "`", "\U0001f469\u200d\U0001f467", "\u2192", "\u3002", "<speak>", "<p>", "&amp;", "</s>"],
    *["THE ", "DOG ", "NASA", "FBI ", "I ", "A ", "STOP", "the dog ", "It is late. ", "5", "IV ", "\ufb01"],
]  # fmt: skip
DIRTY = st.lists(
    st.sampled_from(DIRT) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=16
).map("".join)


@settings(deadline=None, max_examples=200)
@given(text=DIRTY, cuts=CUTS)
def test_pieces_are_cleaned_as_the_whole(text, cuts):
    cleaned = clean(text)
    assert clean(text, cuts) == cleaned
    assert cleaned == cleaned.strip() and "  " not in cleaned and "\u200b" not in cleaned and "\x00" not in cleaned


def test_golden_texts_are_left_alone():
    golden = json.loads((GOLDEN / "expected.json").read_text())
    texts = [text for case in golden["cases"].values() for text in case["texts"]] + golden["loss.texts"]
    for side in ("offline", "streaming"):
        processor = load_processor(side=side)
        for text in texts:
            assert processor.normalize(text) == text and processor.split_text(text) == [text]


@pytest.mark.parametrize("text", ["...", "?", "-", "\U0001f600", "\u200b.", "!!! \u2014 ???", "<speak></speak>"])
def test_text_with_nothing_to_say(text):
    processor = load_processor()
    for read in (processor, processor.split_text, lambda text: read_by_pieces(SledTextSource(processor), text, [])):
        with pytest.raises(ValueError, match="`text` has nothing to say"):
            read(text)
    # Inside a longer text it is passed over.
    assert processor.split_text(f"It is late. {text} The dog barked.")[0].startswith("It is late.")
    parts = load_processor(max_part_seconds=2.0).split_text(f"It is late.\n\n{text}\n\nThe dog barked.")
    if not text.startswith("<"):
        assert parts == ["It is late.", " The dog barked."]


# Normalization


HARD_LINES = [json.loads(line) for line in Path("evaluation/data/hard_lines.jsonl").read_text().splitlines()]


def test_hard_lines_are_read_as_they_should_be():
    assert len(HARD_LINES) == 200
    wrong = [line["text"] for line in HARD_LINES if clean(line["text"], normalizer="en") != line["read"]]
    assert len(wrong) <= 10, wrong


HARD_FRAGMENTS = [
    *["May ", "5", ", 2020 ", "1,234", "$3", ".50", " million ", "p.m. ", "Dr. ", "St. ", "Smith ", "www.", "example.com/a", "a@b.org ", "VIII "],
    *["King Henry ", "1/2 ", "½", "-5 ", "3.1.2 ", "v2", "555-", "1234 ", "10:30", " am ", "NASA ", "FBI", "e.g. ", "No. ", "%", " km ", "the ", "in 19"],
    *["94 ", ". ", ", ", " ", "\n\n", "24/7 ", "5'11\" ", "'80s ", "1990s ", "<s> ", "&", " #1 ", "+44 20 ", "I ", "World War ", "H2O "],
]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    text=st.lists(st.sampled_from(HARD_FRAGMENTS) | st.sampled_from([line["text"] for line in HARD_LINES]), max_size=14).map("".join),
    cuts=CUTS,
)  # fmt: skip
def test_pieces_are_normalized_as_the_whole(text, cuts):
    normalized = clean(text, normalizer="en")
    assert clean(text, cuts, normalizer="en") == normalized
    assert not any(character.isdigit() for character in normalized)


@settings(deadline=None, max_examples=60)
@given(text=DIRTY, cuts=CUTS, normalizer=st.sampled_from(["en", str.title, lambda text: f"{text} {text[::-1]}."]))
def test_normalized_parts_are_those_of_the_whole(text, cuts, normalizer):
    processor = load_processor(max_part_seconds=3.0, normalizer=normalizer)
    try:
        expected = [encode_text(processor.tokenizer, part) for part in processor.split_text(text)]
    except ValueError as error:
        assert "nothing to say" in str(error)
        return
    assert read_by_pieces(SledTextSource(processor), text, cuts) == expected


def test_only_what_may_go_on_waits():
    reader = SledTextReader(normalizer="en")
    assert reader.push("The dog cost $3") == ["The", " dog", " cost"]
    assert reader.push(".50 ") == []
    assert "".join(reader.push("in all ")) == " three dollars and fifty cents in all"


def test_a_function_gets_whole_sentences():
    seen = []

    def normalize(sentence: str) -> str:
        seen.append(sentence)
        return sentence.replace("3", "three")

    processor = load_processor(normalizer=normalize)
    assert processor.normalize("Dr. Smith saw 3 dogs. He left.\n\n3 cats came") == (
        "Dr. Smith saw three dogs. He left.\n\nthree cats came"
    )
    assert seen == ["Dr. Smith saw 3 dogs.", "He left.", "3 cats came"]
    # What a voice prompt says is read in the same way, what is trained on is not.
    sound = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    voice = {"prompt_audio": sound, "sampling_rate": 24_000}
    ids = processor("2 dogs", prompt_text="3 cats", **voice)["input_ids"][0].tolist()
    assert ids == encode_text(processor.tokenizer, "three cats 2 dogs")
    ids = processor("3\u00a0dogs", audio=sound, sampling_rate=24_000)["input_ids"][0].tolist()
    assert ids == encode_text(processor.tokenizer, "3 dogs")


def test_a_normalizer_is_saved_by_name(tmp_path, caplog):
    load_processor(normalizer="en", max_part_seconds=5.0).save_pretrained(tmp_path)
    loaded = SledProcessor.from_pretrained(tmp_path)
    assert (loaded.normalizer, loaded.max_part_seconds) == ("en", 5.0)
    assert loaded.normalize("5 km") == "Five kilometers"
    load_processor(normalizer=str.lower).save_pretrained(tmp_path)
    assert SledProcessor.from_pretrained(tmp_path).normalizer is None
    assert SledProcessor.from_pretrained(tmp_path, normalizer="en").normalizer == "en"


def test_without_its_package(tmp_path, monkeypatch):
    load_processor(normalizer="en").save_pretrained(tmp_path)
    monkeypatch.setattr(normalization_sled, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`normalizer` 'en' needs"):
        load_processor.__wrapped__(normalizer="en")
    loaded = SledProcessor.from_pretrained(tmp_path)
    assert loaded.normalize("5 km") == "5 km" and loaded.to_dict()["normalizer"] == "en"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[("max_part_seconds", {"max_part_seconds": value}) for value in (0, -1.0, 0.5, float("nan"), float("inf"), "6", True)],
        *[("normalizer", {"normalizer": value}) for value in ("de", 5, "", True)],
    ],
)  # fmt: skip
def test_bad_settings(name, arguments):
    with pytest.raises(ValueError, match=f"`{name}`"):
        load_processor.__wrapped__(**arguments)
    with pytest.raises(ValueError, match="`normalizer` must return a string"):
        load_processor(normalizer=len).normalize("The dog.")


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60))
def test_any_text_is_normalized_or_refused(text):
    try:
        clean_text = load_processor(normalizer="en").normalize(text)
    except ValueError as error:
        assert "`text` must be valid Unicode" in str(error)
        return
    assert isinstance(clean_text, str)


# Documentation


@pytest.mark.parametrize("name", ["SledIncrementalTokenizer", "SledWordReader"])
def test_documented_examples_run(name, tmp_path):
    # The released interleaved checkpoint's tokenizer is replaced by the golden one of the same kind.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((GOLDEN / "streaming" / file).read_bytes())
    examples = doctest.DocTestFinder(recurse=False).find(getattr(text_sled, name), name, module=text_sled)
    assert len(examples) == 1 and examples[0].examples
    for example in examples[0].examples:
        example.source = example.source.replace("ICTNLP/SLED-TTS-Streaming-Libriheavy", str(tmp_path))
    assert doctest.DocTestRunner().run(examples[0]).failed == 0
