"""Texts of the kinds that a corpus lacks."""

import pytest

from transformers_sled.training import read_wordnet, read_words, write_short_texts, write_texts, write_word_lists


@pytest.fixture
def wordnet(tmp_path):
    """Four examples, of which one has a figure, and four senses, of which one is a common noun that is spelled small."""
    lines = [
        "  1 a licence",
        '00001740 03 n 01 entity 0 000 | that which is; "a dark room"; "the earth was bare of it"',
        '2 03 n 01 x 0 000 | odd; "is it 5 o\'clock?"; "who goes there?"; "look out!"',
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    senses = ["dog%1:05:00:: 02084071 1 42", "dodo%1:05:00:: 1 1 0", "run%2:38:00:: 1 1 106", "Rome%1:15:00:: 1 1 9"]
    (tmp_path / "index.sense").write_text("\n".join(senses) + "\n")
    return tmp_path


def test_examples_and_common_nouns_are_read(wordnet):
    examples, nouns = read_wordnet(wordnet)
    assert examples == ["a dark room", "the earth was bare of it", "who goes there?", "look out!"]
    assert nouns == ["dog"]


def test_texts_are_of_all_kinds(wordnet):
    texts = write_texts(*read_wordnet(wordnet), per_kind=40)
    assert {"A dark room.", "Who goes there?", "Look out!", "Dog.", "Thank you."} <= set(texts)
    assert any('"The earth was bare of it."' in text for text in texts)
    assert any("January" in text or "July" in text for text in texts)
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text[0].isupper() or text[0] == '"'
        assert text[-1] in '.?!"' and not any(character.isdigit() for character in text)


def test_the_same_seed_gives_the_same_texts(wordnet):
    words = read_wordnet(wordnet)
    assert write_texts(*words, per_kind=40, seed=1) == write_texts(*words, per_kind=40, seed=1)
    assert write_texts(*words, per_kind=40, seed=1) != write_texts(*words, per_kind=40, seed=2)


def test_short_texts_are_one_word_or_two_with_any_mark(wordnet):
    texts = write_short_texts(["dog"], 400)
    assert texts == write_short_texts(["dog"], 400) and len(texts) == 400
    assert {len(text.split()) for text in texts} == {1, 2} and {text[-1] for text in texts} == set(".?!")
    assert {text[:-1] for text in texts} > {"Dog", "Yes", "Of course", "Tuesday"}
    assert any(text.startswith("Twenty-") for text in texts)
    with pytest.raises(ValueError, match="`nouns` is empty"):
        write_short_texts([], 4)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        write_short_texts(["dog"], 0)


def test_words_come_as_they_are_spelled_the_most_frequent_first(tmp_path):
    lines = [
        "  1 a licence",
        "00001740 15 n 02 Rome 0 Eternal_City 0 000 | a city",
        "00001741 15 n 03 March 0 USSR 0 o'clock 0 000 | a month",
        "00001742 38 v 0b run 0 march 1 a1 0 it 0 bear 0 bull 0 cat 0 cow 0 dog 0 eel 0 fox 0 001 @ 00001740 v 0000 | go",
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    (tmp_path / "index.sense").write_text(
        "dog%1:05:00:: 1 1 3\nrun%2:38:00:: 1 1 2\nrun%2:39:00:: 1 1 2\nrome%1:15:00:: 1 1 1\n"
    )
    assert read_words(tmp_path) == ["run", "dog", "Rome", "bear", "bull", "cat", "cow", "eel", "fox", "march"]


def test_lists_have_the_first_words_that_a_corpus_lacks():
    words = ["take", "dog", "Rome", "get", "bear", "have", "person", "make", "give", "use", "find", "tell", "last"]
    texts = write_word_lists(words, ["A DOG, a bear."], 2)
    assert texts == write_word_lists(words, ["A DOG, a bear."], 2) != write_word_lists(words, [], 2)
    spoken = [word for text in texts for word in text.lower().replace(",", "").rstrip(".").split() if word != "and"]
    assert sorted(spoken) == sorted(word.lower() for word in words if word not in ("dog", "bear", "last"))
    assert all(text[0].isupper() and text.endswith(".") and text.count(",") == 4 for text in texts)
    assert len(write_word_lists(words, [], 100)) == 2
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        write_word_lists(words, [], 0)
    with pytest.raises(ValueError, match="`words` has 1 that are not in `known`"):
        write_word_lists(["take", "dog"], ["take"], 1)


def test_excluded_texts_stay_out_whatever_their_capitals(wordnet):
    assert "A dark room." not in write_texts(*read_wordnet(wordnet), per_kind=40, exclude=["A DARK, room!"])


def test_words_that_are_not_there_are_refused(tmp_path):
    for read in (read_wordnet, read_words):
        with pytest.raises(ValueError, match="must have WordNet's files"):
            read(tmp_path)
    with pytest.raises(ValueError, match="must have statements and nouns, got 0 and 1"):
        write_texts(["a dark room"], ["dog"], per_kind=4)
