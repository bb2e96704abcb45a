"""The audio streamer, and tokenization of text as it arrives."""

import doctest
import functools
import gc
import itertools
import json
import queue
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast, RobertaTokenizer

from small_codec import decode_whole, live_tensor_bytes, make_codec, make_latents, split
from transformers_sled import streaming_sled
from transformers_sled.streaming_sled import (
    SledAudioStreamer,
    SledIncrementalTokenizer,
    encode_text,
)


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
TOKENIZERS = ["offline", "streaming", "trained"]
CONTROL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


# The audio streamer


def generate(streamer, frames, error=None, stopped=None):
    """What a model's `generate` does with a streamer: frame by frame, until the end, an error, or nobody listens."""
    for frame in frames:
        if streamer.closed:
            stopped.set()
            return
        streamer.put(frame)
    streamer.end(error)


def start_thread(*args, **kwargs) -> threading.Thread:
    thread = threading.Thread(target=generate, args=args, kwargs=kwargs, daemon=True)
    thread.start()
    return thread


class ModelWithCodec(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(1, 1)
        self.codec = make_codec()


@pytest.mark.parametrize("make_model", [make_codec, ModelWithCodec])
def test_streamer_gives_the_whole_speech(make_model):
    latents = make_latents(90)
    streamer = SledAudioStreamer(make_model(), chunk_duration=0.02, timeout=60)
    thread = start_thread(streamer, latents.split(1, dim=1))
    waveforms = list(streamer)
    thread.join()
    assert all(waveform.ndim == 1 and waveform.dtype == torch.float32 for waveform in waveforms)
    frames = [len(waveform) / 24 for waveform in waveforms]
    assert frames == [7, 20, 20, 20, 20, 3]
    torch.testing.assert_close(torch.cat(waveforms), decode_whole(make_codec(), latents)[0], atol=1e-5, rtol=0)
    assert list(streamer) == []


def test_streamer_by_next():
    streamer = SledAudioStreamer(make_codec())
    latents = make_latents(9)
    generate(streamer, latents.split(1, dim=1))
    waveforms = [next(streamer), next(streamer)]
    torch.testing.assert_close(torch.cat(waveforms), decode_whole(make_codec(), latents)[0], atol=1e-5, rtol=0)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(streamer)


def test_streamer_cuts_the_prompt_off():
    latents = make_latents(50)
    streamer = SledAudioStreamer(make_codec())
    streamer.put(latents[:, :20], is_prompt=True)
    generate(streamer, latents[:, 20:].split(1, dim=1))
    expected = decode_whole(make_codec(), latents)[0, 20 * 24 :]
    torch.testing.assert_close(torch.cat(list(streamer)), expected, atol=1e-5, rtol=0)


def test_streamer_raises_the_error_of_the_generation():
    streamer = SledAudioStreamer(make_codec())
    start_thread(streamer, make_latents(8).split(1, dim=1), error=KeyError("the source failed"))
    with pytest.raises(KeyError, match="the source failed"):
        list(streamer)
    assert list(streamer) == []


def test_streamer_delivers_audio_before_the_error():
    streamer = SledAudioStreamer(make_codec())
    generate(streamer, make_latents(8).split(1, dim=1), error=RuntimeError("out of memory"))
    assert len(next(streamer)) == 7 * 24
    with pytest.raises(RuntimeError, match="out of memory"):
        next(streamer)
    with pytest.raises(StopIteration):
        next(streamer)


def consume_one_and_leave(streamer):
    for _ in streamer:
        break


def consume_and_fail(streamer):
    for _ in streamer:
        raise OSError("the sound card is gone")


def drop_iterator_unused(streamer):
    iter(streamer)


@pytest.mark.parametrize(
    "leave",
    [consume_one_and_leave, consume_and_fail, drop_iterator_unused, SledAudioStreamer.close],
    ids=["break", "error", "drop", "close"],
)
def test_generation_stops_when_nobody_listens(leave):
    streamer = SledAudioStreamer(make_codec())
    stopped = threading.Event()
    thread = start_thread(streamer, itertools.repeat(make_latents(1)), stopped=stopped)
    try:
        leave(streamer)
    except OSError:
        gc.collect()
    assert stopped.wait(timeout=10)
    thread.join()
    streamer.put(make_latents(1))
    streamer.end()
    assert list(streamer) == []


def test_close_wakes_a_waiting_consumer():
    streamer = SledAudioStreamer(make_codec())
    received: list = []
    consumer = threading.Thread(target=lambda: received.extend(streamer), daemon=True)
    consumer.start()
    time.sleep(0.05)
    streamer.close()
    consumer.join(timeout=10)
    assert not consumer.is_alive()
    assert received == []


def test_streamer_timeout():
    streamer = SledAudioStreamer(make_codec(), timeout=0.01)
    with pytest.raises(queue.Empty, match=r"0\.01"):
        list(streamer)
    assert streamer.closed


def test_abandoned_streams_leave_nothing():
    codec = make_codec()
    used = []
    references = []
    for _ in range(60):
        streamer = SledAudioStreamer(codec)
        thread = start_thread(streamer, itertools.repeat(make_latents(1)), stopped=threading.Event())
        consume_one_and_leave(streamer)
        thread.join()
        references.append(weakref.ref(streamer))
        del streamer, thread
        if len(references) % 20 == 0:
            used.append(live_tensor_bytes())
    assert all(reference() is None for reference in references)
    assert set(used) == {used[0]}


def test_bad_streamer_use():
    with pytest.raises(ValueError, match="EncodecModel"):
        SledAudioStreamer(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="chunk_duration"):
        SledAudioStreamer(make_codec(), chunk_duration=0)
    with pytest.raises(ValueError, match="timeout"):
        SledAudioStreamer(make_codec(), timeout=-1)
    streamer = SledAudioStreamer(make_codec())
    with pytest.raises(ValueError, match="batch size 1, got 2"):
        streamer.put(make_latents(3, batch_size=2))
    streamer.end()
    with pytest.raises(RuntimeError, match="end"):
        streamer.put(make_latents(1))


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


# Documentation


@pytest.mark.parametrize("name", ["SledIncrementalTokenizer"])
def test_documented_examples_run(name, tmp_path):
    # The released interleaved checkpoint's tokenizer is replaced by the golden one of the same kind.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((GOLDEN / "streaming" / file).read_bytes())
    examples = doctest.DocTestFinder(recurse=False).find(getattr(streaming_sled, name), name, module=streaming_sled)
    assert len(examples) == 1 and examples[0].examples
    for example in examples[0].examples:
        example.source = example.source.replace("ICTNLP/SLED-TTS-Streaming-Libriheavy", str(tmp_path))
    assert doctest.DocTestRunner().run(examples[0]).failed == 0
