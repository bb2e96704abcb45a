"""A few utterances as audio and as codes, a model to train on them, alignments, and a codec of another shape."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer, EncodecConfig, EncodecFeatureExtractor, EncodecModel

from example_runner import run_example
from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled.training import PreparationArguments, align_text, load_source, prepare_dataset


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Codes of 8 utterances of 40 to 54 frames by two speakers."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": f"u+{index}",
            "text": ["Stop.", "Two plus two."][index % 2],
            "speaker": "abba"[index % 4],
            "audio": {"array": 0.1 * rng.standard_normal(320 * (40 + 2 * index)), "sampling_rate": 24000},
        }
        for index in range(8)
    ]
    codec = EncodecModel.from_pretrained(GOLDEN / "codec").eval()
    prepare_dataset(datasets.Dataset.from_list(rows), codec, PreparationArguments(str(folder), min_duration=0.0))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The golden offline model with its codec, without dropout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec")
    for name in ("dropout", "activation_dropout", "attention_dropout", "text_dropout_prob"):
        setattr(model.config, name, 0.0)
    model.config.latent_noise_std = 0.25
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "offline")
    SledProcessor(EncodecFeatureExtractor.from_pretrained(GOLDEN / "codec"), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alignments(data, checkpoint, tmp_path_factory):
    """The file that align_text.py writes for the data."""
    output = tmp_path_factory.mktemp("alignments") / "alignments.parquet"
    settings = {"dataset": data, "tokenizer": checkpoint, "codec": GOLDEN / "codec", "output": output}
    run_example("tiny_voice/align_text.py", iterations=2, **settings)
    return output


@pytest.fixture(scope="session")
def alignments_with_phonemes(data, checkpoint, tmp_path_factory):
    """The same with phonemes, 60 labels a second, which change every quarter of a second."""
    output = tmp_path_factory.mktemp("phonemes") / "alignments.parquet"
    features = datasets.Features(
        id=datasets.Value("string"), phonemes=datasets.Sequence(datasets.ClassLabel(names=["sil", "a", "b"]))
    )
    rows = [{"id": f"u+{index}", "phonemes": [(time // 15) % 3 for time in range(60)]} for index in range(8)]
    labels = datasets.Dataset.from_list(rows, features=features)
    codec, tokenizer = EncodecModel.from_pretrained(GOLDEN / "codec"), AutoTokenizer.from_pretrained(checkpoint)
    align_text(load_source(str(data)), tokenizer, codec, labels, 2).to_parquet(output)
    return output


@pytest.fixture(scope="session")
def noise_corpus(tmp_path_factory):
    """Six utterances of noise of about a second, the last one of a tenth."""
    file = tmp_path_factory.mktemp("corpus") / "train-00.parquet"
    rng, rows = np.random.default_rng(0), []
    for index, length in enumerate([24_000, 24_100, 24_200, 24_300, 24_400, 2_400]):
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.1 * rng.standard_normal(length), 24_000, format="WAV")
        rows.append({"id": str(index), "audio": {"bytes": buffer.getvalue(), "path": None}})
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file


@pytest.fixture(scope="session")
def other_shape(tmp_path_factory):
    """The golden codec's configuration with other ratios and more filters."""
    config = EncodecConfig.from_pretrained(GOLDEN / "codec")
    config.upsampling_ratios = config.upsampling_ratios[::-1]
    config.num_filters += 2
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    return folder
