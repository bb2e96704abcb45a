"""`pipeline("text-to-speech")`: single texts, lists, batches, voice prompts, and none of the traps on the way."""

import shutil

import numpy as np
import pytest
import torch
from transformers import pipeline

from transformers_sled import SledForSpeechSynthesis, SledProcessor


GOLDEN = "tests/fixtures/golden"
TEXTS = ["The dog barked all night.", "Stop.", "She was humiliated by his remarks, and she left."]
VOICE = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)


@pytest.fixture(scope="module", params=["offline", "streaming"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    SledForSpeechSynthesis.from_pretrained(f"{GOLDEN}/{request.param}", codec=f"{GOLDEN}/codec").save_pretrained(
        folder
    )
    SledProcessor.from_pretrained(f"{GOLDEN}/{request.param}").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("text-to-speech", model=checkpoint)


def test_has_its_own_processor_and_rate(pipe):
    assert isinstance(pipe.processor, SledProcessor) and isinstance(pipe.model, SledForSpeechSynthesis)
    assert pipe.sampling_rate == 24_000


@pytest.mark.parametrize(
    "names",
    [["processor"], ["tokenizer"], ["tokenizer", "processor"], ["feature_extractor"], ["processor as tokenizer"], []],
)
def test_a_model_in_memory_has_a_full_processor(pipe, names):
    processor = pipe.processor
    parts = {
        "processor": processor,
        "tokenizer": processor.tokenizer,
        "feature_extractor": processor.feature_extractor,
    }
    given = {"tokenizer": processor} if names == ["processor as tokenizer"] else {name: parts[name] for name in names}
    other = pipeline("text-to-speech", model=pipe.model, **given)
    assert isinstance(other.processor, SledProcessor) and other.sampling_rate == 24_000
    assert other.tokenizer is other.processor.tokenizer
    with pytest.raises(ValueError, match=r"`prompt_audio` 'nowhere.wav' does not exist"):
        other(TEXTS[0], preprocess_params={"prompt_text": "x", "prompt_audio": "nowhere.wav"})
    voice = {"prompt_text": "And this.", "prompt_audio": VOICE, "sampling_rate": 16_000}
    inputs = other.preprocess(TEXTS[0], **voice)
    assert torch.equal(inputs["prompt_values"], processor(TEXTS[0], **voice)["prompt_values"])


def test_a_model_from_nowhere_needs_a_tokenizer(pipe):
    model = SledForSpeechSynthesis(pipe.model.config.__class__.from_dict({**pipe.model.config.to_dict()}))
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match="`processor` is missing"):
        pipeline("text-to-speech", model=model)
    with pytest.raises(ValueError, match="`processor` must be a `SledProcessor`, got EncodecFeatureExtractor"):
        pipeline("text-to-speech", model=model, processor=pipe.processor.feature_extractor)
    made = pipeline("text-to-speech", model=model, tokenizer=pipe.processor.tokenizer).processor
    assert made.to_dict() == pipe.processor.to_dict()


def test_a_processor_that_cannot_be_loaded_is_not_replaced(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "broken")
    (tmp_path / "broken" / "processor_config.json").write_text(
        '{"processor_class": "SledProcessor", "hop_length": 320'
    )
    with pytest.raises((OSError, ValueError), match=r"processor_config\.json"):
        pipeline("text-to-speech", model=tmp_path / "broken")


def test_equals_generate(pipe):
    (expected,) = pipe.model.generate(
        **pipe.processor(TEXTS[0]), generator=torch.Generator().manual_seed(0), max_new_tokens=20
    )
    generate_kwargs = {"generator": torch.Generator().manual_seed(0), "max_new_tokens": 20}
    speech = pipe(TEXTS[0], generate_kwargs=generate_kwargs)
    assert speech["sampling_rate"] == 24_000
    np.testing.assert_allclose(speech["audio"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_and_batches(pipe, batch_size):
    speech = pipe(TEXTS, batch_size=batch_size, generate_kwargs={"max_new_tokens": 10, "eos_threshold": 1.0})
    audio = [
        audio for item in speech for audio in (item["audio"] if isinstance(item["audio"], list) else [item["audio"]])
    ]
    assert [len(one) for one in audio] == [3200] * 3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_voice_prompt_is_cut_off(pipe, batch_size):
    voice = {"prompt_text": "And this.", "prompt_audio": VOICE, "sampling_rate": 16_000}
    generate_kwargs = {"max_new_tokens": 10, "eos_threshold": 1.0}
    speech = pipe(TEXTS[:2], batch_size=batch_size, preprocess_params=voice, generate_kwargs=generate_kwargs)
    audio = [
        audio for item in speech for audio in (item["audio"] if isinstance(item["audio"], list) else [item["audio"]])
    ]
    assert [len(one) for one in audio] == [3200] * 2


def test_default_limit_of_new_tokens_does_not_cut_speech(pipe):
    speech = pipe(TEXTS[2], generate_kwargs={"eos_threshold": 1.0})
    assert len(speech["audio"]) > 256 * 320


def test_prompt_reaches_a_model_of_lower_precision_unrounded(checkpoint):
    pipe = pipeline("text-to-speech", model=checkpoint, dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in pipe.model.codec.parameters()} == {torch.float32}
    inputs = pipe.preprocess(TEXTS[0], prompt_audio=VOICE, sampling_rate=24_000)
    torch.testing.assert_close(inputs["prompt_values"][0, 0], torch.from_numpy(VOICE), rtol=0, atol=0)
    assert np.isfinite(pipe(TEXTS[0], generate_kwargs={"max_new_tokens": 5})["audio"]).all()
