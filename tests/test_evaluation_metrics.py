"""The evaluation's metrics, against jiwer's own examples, hand-computed cases and the encoders themselves."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch


evaluate = pytest.importorskip("evaluate")
pytest.importorskip("jiwer")

EVALUATION = Path(__file__).parents[1] / "evaluation"
sys.path.insert(0, str(EVALUATION))

from metrics.dnsmos import dnsmos  # noqa: E402
from metrics.speaker_similarity import speaker_encoders  # noqa: E402
from metrics.word_error_rate import word_error_rate  # noqa: E402
from summary import encoder_sanity, equal_error_rate, interval, ratio  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    """The modules have to load without a network; their cache stays out of the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_EVALUATE_OFFLINE", "1")
    patch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    patch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def error_rate():
    return evaluate.load(str(EVALUATION / "metrics" / "word_error_rate"))


def test_the_examples_of_jiwer(error_rate):
    result = error_rate.compute(predictions=["hello duck"], references=["hello world"], normalize=False)
    assert result["word_error_rate"] == 50
    result = error_rate.compute(
        predictions=["i kan cpell", "i hop"], references=["i can spell", "i hope"], normalize=False
    )
    assert result["word_error_rate"] == 60
    assert result["character_error_rate"] == pytest.approx(100 * 3 / 17)
    assert (result["substitutions"], result["hits"], result["reference_words"]) == (3, 2, 5)


def test_the_rate_is_of_the_corpus_and_not_a_mean_of_rates(error_rate):
    result = error_rate.compute(predictions=["a b c x", "x"], references=["a b c d", "y"])
    assert result["word_error_rate"] == pytest.approx(100 * 2 / 5)


def test_edits_are_told_apart(error_rate):
    result = error_rate.compute(predictions=["the big dog ran"], references=["the dog sat down"], normalize=False)
    assert [result[name] for name in ("insertions", "deletions", "substitutions", "hits")] == [1, 1, 1, 2]


def test_perfect_speech_is_0_and_silence_100(error_rate):
    texts = ["The dog barked all night.", "She left in the morning."]
    assert error_rate.compute(predictions=texts, references=texts)["word_error_rate"] == 0
    silence = error_rate.compute(predictions=["", ""], references=texts)
    assert (silence["word_error_rate"], silence["character_error_rate"]) == (100, 100)
    assert silence["deletions"] == silence["reference_words"] == 10


def test_empty_references_count_as_insertions_and_none_at_all_is_refused(error_rate):
    result = error_rate.compute(predictions=["a b", "c"], references=["", "c"])
    assert (result["insertions"], result["reference_words"], result["word_error_rate"]) == (2, 1, 200)
    assert error_rate.compute(predictions=["", "c"], references=["", "c"])["word_error_rate"] == 0
    with pytest.raises(ValueError, match="no word"):
        error_rate.compute(predictions=["a"], references=["?!"])


@pytest.mark.parametrize(
    ("heard", "written"),
    [
        ("mister smith will not come", "Mr. Smith won't come!"),
        ("i have 22 dogs", "I've twenty-two dogs"),
        ("uh the dog", "The dog"),
        ("He (laughs) left.", "he left"),
    ],
)
def test_english_is_normalized_as_whisper_does(error_rate, heard, written):
    assert error_rate.compute(predictions=[heard], references=[written])["word_error_rate"] == 0


def test_spellings_are_mapped_exactly_where_the_table_is(error_rate):
    result = error_rate.compute(predictions=["the color"], references=["the colour"])
    has_table = find_spec("whisper_normalizer") is not None
    assert result["word_error_rate"] == (0 if has_table else 50)
    assert (result["spelling_entries"] > 1000) == has_table


def test_other_languages_keep_their_words(error_rate):
    result = error_rate.compute(predictions=["DER hund, zwei"], references=["Der Hund: zwei!"], language="de")
    assert (result["word_error_rate"], result["spelling_entries"]) == (0, 0)
    # English rules would read the number and the abbreviation.
    assert error_rate.compute(predictions=["2"], references=["two"], language="de")["word_error_rate"] == 100


def test_functions_and_module_agree(error_rate):
    pairs = [("the dog", "the big dog"), ("a cat sat", "a cat")]
    rates = word_error_rate.error_rates([word_error_rate.edit_counts(*pair) for pair in pairs])
    result = error_rate.compute(predictions=[pair[0] for pair in pairs], references=[pair[1] for pair in pairs])
    assert rates.items() <= result.items()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=[16, 16, 16, 16, 32],
        xvector_output_dim=24,
    )
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return str(folder)


def waveform(seed: int, seconds: float = 1.0, sampling_rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * sampling_rate))).astype(np.float32)


def test_speaker_similarity_is_the_cosine_of_the_models_embeddings(encoder_folder):
    from transformers import AutoFeatureExtractor, WavLMForXVector

    first, second = waveform(1), waveform(2, seconds=1.5)
    extractor = AutoFeatureExtractor.from_pretrained(encoder_folder)
    model = WavLMForXVector.from_pretrained(encoder_folder).eval()
    with torch.no_grad():
        expected = torch.nn.functional.cosine_similarity(
            *(
                model(**extractor(audio, sampling_rate=16_000, return_tensors="pt")).embeddings
                for audio in (first, second)
            )
        ).item()
    metric = evaluate.load(str(EVALUATION / "metrics" / "speaker_similarity"))
    result = metric.compute(
        predictions=[first, first], references=[second, first], sampling_rate=16_000, encoder=encoder_folder
    )
    assert result["speaker_similarities"] == pytest.approx([expected, 1], abs=1e-5)
    assert result["speaker_similarity"] == pytest.approx((expected + 1) / 2, abs=1e-5)


def test_silence_and_short_audio_have_no_voice_or_a_finite_one(encoder_folder):
    encoder = speaker_encoders.load_speaker_encoder(encoder_folder)
    assert speaker_encoders.embed(encoder, np.zeros(16_000), 16_000) is None
    embedding = speaker_encoders.embed(encoder, waveform(0, seconds=0.01), 16_000)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)


def test_missing_encoders_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="nothing-here"):
        speaker_encoders.load_speaker_encoder(str(tmp_path / "nothing-here"))
    monkeypatch.setattr(speaker_encoders, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"resemblyzer.*not installed: pip install"):
        speaker_encoders.load_speaker_encoder("resemblyzer")


def test_dnsmos_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(dnsmos, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"speechmos.*not installed: pip install"):
        dnsmos.quality(waveform(0), 16_000)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("speechmos") is None, reason="the package speechmos is not installed")
def test_dnsmos_hears_noise():
    metric = evaluate.load(str(EVALUATION / "metrics" / "dnsmos"))
    result = metric.compute(predictions=[waveform(0, seconds=2)], sampling_rate=16_000)
    assert 1 <= result["overall"] < 2
    assert result["overall_scores"] == [result["overall"]]


def test_equal_error_rate_by_hand():
    assert equal_error_rate(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == 0
    assert equal_error_rate(np.array([0.1, 0.2]), np.array([0.8, 0.9])) == 100
    # One of four same pairs lies below, one of four different pairs above any threshold between 0.4 and 0.6.
    assert equal_error_rate(np.array([0.3, 0.7, 0.8, 0.9]), np.array([0.1, 0.2, 0.35, 0.65])) == 25


def test_sanity_of_the_encoder_needs_pairs_of_both_kinds():
    a, b = np.eye(2)
    assert encoder_sanity([a, a, b], ["x", "x", "y"]) == {
        "equal_error_rate": 0,
        "same_speaker_pairs": 1,
        "different_speaker_pairs": 2,
    }
    assert encoder_sanity([a, b], ["x", "y"]) is None
    assert encoder_sanity([a, b], ["x", "x"]) is None
    assert encoder_sanity([a], ["x"]) is None


def test_intervals_hold_the_value_and_repeat():
    rng = np.random.default_rng(0)
    errors, words = rng.integers(0, 3, 200).tolist(), rng.integers(5, 15, 200).tolist()
    low, high = interval(ratio, errors, words)
    assert low < 100 * sum(errors) / sum(words) < high
    assert interval(ratio, errors, words) == [low, high]
    # Normal theory for the mean: 1.96 standard errors each side.
    values = rng.standard_normal(400)
    low, high = interval(np.mean, values.tolist())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert interval(np.mean, [1.0]) is None
