"""Training of SLED: the same run however it is spread, interrupted and started."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer, EncodecFeatureExtractor, EncodecModel, Trainer, set_seed

from hub_server import Hub
from transformers_sled import SledForSpeechSynthesis
from transformers_sled.processing_sled import SledProcessor
from transformers_sled.training import (
    PreparationArguments,
    SledDataArguments,
    SledDataCollator,
    SledModelArguments,
    SledTrainer,
    SledTrainingArguments,
    add_adapters,
    load_model,
    load_source,
    load_splits,
    parse_recipe,
    prepare_dataset,
)
from transformers_sled.training import trainer as trainer_module
from transformers_sled.training.trainer import EpochLengthGroupedSampler


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
SCRIPT = Path(__file__).parents[2] / "examples" / "train_sled.py"
RECIPES = SCRIPT.parent / "configs"
SENTENCES = ["Stop.", "The dog barked all night.", "She was humiliated by his remarks, and she left.", "Two plus two."]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Codes of 16 utterances of 5 to 35 frames, as training and validation splits."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": f"u{index}",
            "text": f"{SENTENCES[index % 4]} Number {index}.",
            "audio": {"array": 0.1 * rng.standard_normal(320 * (5 + 2 * index)), "sampling_rate": 24000},
        }
        for index in range(16)
    ]
    codec = EncodecModel.from_pretrained(GOLDEN / "codec").eval()
    for split, some in (("train", rows), ("validation", rows[::4])):
        arguments = PreparationArguments(str(folder), split=split, min_duration=0.0)
        prepare_dataset(datasets.Dataset.from_list(some), codec, arguments)
    return folder


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory):
    """The golden offline model with its codec."""
    folder = tmp_path_factory.mktemp("with_dropout")
    SledForSpeechSynthesis.from_pretrained(GOLDEN / "offline", codec=GOLDEN / "codec").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "offline")
    feature_extractor = EncodecFeatureExtractor.from_pretrained(GOLDEN / "codec")
    SledProcessor(feature_extractor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(with_dropout, tmp_path_factory):
    """The same without any dropout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = SledForSpeechSynthesis.from_pretrained(with_dropout)
    for name in ("dropout", "activation_dropout", "attention_dropout", "text_dropout_prob"):
        setattr(model.config, name, 0.0)
    model.save_pretrained(folder)
    SledProcessor.from_pretrained(with_dropout).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(data, tmp_path):
    def build(output, **changes):
        values = {
            "dataset_name": data,
            "output_dir": tmp_path / output,
            "do_train": True,
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
        return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]

    return build


@pytest.fixture
def train(arguments, tmp_path):
    """Does what the example does in this process and returns its folder."""

    def run(output, **changes):
        types = [SledModelArguments, SledDataArguments, SledTrainingArguments]
        model_args, data_args, args = parse_recipe(types, arguments(output, **changes))
        set_seed(args.seed)
        model, processor = load_model(model_args)
        train_dataset, eval_dataset = load_splits(data_args, args, model, processor)
        trainer = SledTrainer(
            add_adapters(model, model_args),
            args,
            SledDataCollator(processor),
            train_dataset,
            eval_dataset,
            processing_class=processor,
        )
        trainer.run(data_args.dataset_name, model_args.model_name_or_path)
        return tmp_path / output

    return run


def read_log(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "loss" in entry}


def assert_same_losses(actual, expected, tolerance, steps=None):
    steps = sorted(expected) if steps is None else steps
    for name in ("loss", "energy_loss", "eos_loss"):
        np.testing.assert_allclose(
            [actual[step][name] for step in steps], [expected[step][name] for step in steps], atol=tolerance, rtol=0
        )


GIVE_NOISE = """
import zlib
import torch
from transformers_sled.training import collator
class CollatorWithNoise(collator.SledDataCollator):
    def __call__(self, examples):
        batch = super().__call__(examples)
        batch["noise"] = torch.zeros(2, *batch["audio_codes_mask"].shape, 24)
        for row, example in enumerate(examples):
            frames = len(example["audio_codes"][0])
            generator = torch.Generator().manual_seed(zlib.crc32(example["text"].encode()))
            batch["noise"][:, row, :frames] = torch.randn(2, frames, 24, generator=generator)
        return batch
collator.SledDataCollator = CollatorWithNoise
"""


def launch(arguments, *, prelude="", epilogue="", processes=1, accelerate_config=None, environment=None):
    """Runs the script in processes of its own, between a prelude and an epilogue."""
    command = [sys.executable]
    if accelerate_config is not None:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(accelerate_config)]
    elif processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    runner = Path(arguments[arguments.index("--output_dir") + 1]).parent / "runner.py"
    script = f"import runpy\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    runner.write_text(f"{prelude}\n{script}\n{epilogue}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run([*command, str(runner), *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("split", ["processes", "accumulation"])
def test_the_same_global_batch_trains_the_same(arguments, checkpoint, tmp_path, split):
    # The rows' lengths differ: frames weigh alike wherever they are.
    common = {"model_name_or_path": checkpoint, "train_sampling_strategy": "sequential", "dataloader_drop_last": True}
    one = launch(arguments("one", **common), prelude=GIVE_NOISE)
    assert one.returncode == 0, one.stderr
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 if split == "accumulation" else 1}
    two = launch(arguments("two", **common, **half), prelude=GIVE_NOISE, processes=2 if split == "processes" else 1)
    assert two.returncode == 0, two.stderr
    assert_same_losses(read_log(tmp_path / "two"), read_log(tmp_path / "one"), 1e-4)
    before, weights, expected = (
        SledForSpeechSynthesis.from_pretrained(path).state_dict()
        for path in (checkpoint, tmp_path / "two", tmp_path / "one")
    )
    assert any((expected[name] - before[name]).abs().max() > 1e-3 for name in expected)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-4, rtol=0)


# accelerate shards only on accelerators; torch itself also does on CPUs.
SHARD_ON_CPU = """
import accelerate.state as state
init = state.PartialState.__init__
def init_as_for_gpus(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.MULTI_GPU
state.PartialState.__init__ = init_as_for_gpus
"""


@pytest.mark.slow
def test_fsdp_trains_the_same(arguments, checkpoint, tmp_path):
    common = {"model_name_or_path": checkpoint, "train_sampling_strategy": "sequential", "dataloader_drop_last": True}
    one = launch(arguments("one", **common), prelude=GIVE_NOISE)
    assert one.returncode == 0, one.stderr
    config = yaml.safe_load((RECIPES / "fsdp.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(config))
    sharded = launch(
        arguments("sharded", **common, per_device_train_batch_size=2, save_strategy="steps", save_steps=5),
        prelude=SHARD_ON_CPU + GIVE_NOISE,
        accelerate_config=tmp_path / "fsdp.yaml",
    )
    assert sharded.returncode == 0, sharded.stderr
    assert (tmp_path / "sharded" / "checkpoint-5" / "pytorch_model_fsdp.bin").is_file()
    assert_same_losses(read_log(tmp_path / "sharded"), read_log(tmp_path / "one"), 1e-4)
    weights, expected = (
        SledForSpeechSynthesis.from_pretrained(tmp_path / name).state_dict() for name in ("sharded", "one")
    )
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-4, rtol=0)


KILLED_AT_STEP_7 = """
import os, signal
from transformers import Trainer
step = Trainer.training_step
def step_until_killed(self, *args, **kwargs):
    if self.state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
Trainer.training_step = step_until_killed
"""


def test_killed_and_resumed_is_uninterrupted(train, arguments, with_dropout, tmp_path):
    # Noise, dropout, text dropout and the order of the data are all random; an epoch has 4 steps.
    settings = {
        "model_name_or_path": with_dropout,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "num_audio_samples": 1,
        "save_total_limit": 2,
    }
    killed = launch(arguments("killed", **settings), prelude=KILLED_AT_STEP_7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # A checkpoint that was being written when the process died has no state yet.
    (tmp_path / "killed" / "checkpoint-7").mkdir()
    resumed = read_log(train("killed", **settings))
    folder = train("whole", **settings)
    whole = read_log(folder)
    assert sorted(whole) == list(range(1, 11))
    assert_same_losses(resumed, whole, 1e-5, steps=range(7, 11))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]


def test_evaluation_by_part_with_audio_and_a_card(train, with_dropout):
    settings = {
        "model_name_or_path": with_dropout,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_audio_samples": 2,
        "per_device_eval_batch_size": 3,
        "report_to": "tensorboard",
        "language": "en",
        "license": "apache-2.0",
    }
    folder = train("run", **settings)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4]
    for entry in evaluations:
        assert entry["eval_loss"] == pytest.approx(entry["eval_energy_loss"] + entry["eval_eos_loss"])
    for step in (2, 4):
        samples = folder / "samples" / f"step-{step:07d}"
        assert sorted(path.name for path in samples.iterdir()) == [
            f"{index}.{suffix}" for index in (0, 1) for suffix in ("png", "txt", "wav")
        ]
        assert soundfile.info(samples / "0.wav").samplerate == 24000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.glob("runs/*")
    tags = EventAccumulator(str(events)).Reload().Tags()
    assert {"train/energy_loss", "train/eos_loss", "eval/energy_loss", "eval/eos_loss"} <= set(tags["scalars"])
    assert {"sample/0", "sample/1"} <= set(tags["images"])
    card = ModelCard.load(folder / "README.md")
    assert (card.data.language, card.data.license, card.data.pipeline_tag) == ("en", "apache-2.0", "text-to-speech")
    assert "| utterances | 16 |" in card.text
    assert f"| evaluation energy loss | {evaluations[-1]['eval_energy_loss']:.4f} |" in card.text
    assert str(with_dropout) not in card.content


def test_evaluation_does_not_depend_on_its_batches(train, checkpoint):
    settings = {"model_name_or_path": checkpoint, "do_train": None, "do_eval": True, "num_audio_samples": 0}
    one, four = (
        json.loads(
            (train(f"eval{size}", per_device_eval_batch_size=size, **settings) / "eval_results.json").read_text()
        )
        for size in (1, 4)
    )
    for part in ("energy_loss", "eos_loss"):
        assert one[f"eval_{part}"] == pytest.approx(four[f"eval_{part}"], abs=1e-5)


def test_evaluation_does_not_depend_on_the_number_of_processes(train, arguments, checkpoint, tmp_path):
    # Of the last step's two batches of 4, the first has one new row and the second none; the rest repeats earlier rows.
    settings = {
        "model_name_or_path": checkpoint,
        "do_train": None,
        "do_eval": True,
        "num_audio_samples": 0,
        "eval_split_name": "train",
        "max_eval_samples": 9,
    }
    one = json.loads((train("one", per_device_eval_batch_size=3, **settings) / "eval_results.json").read_text())
    run = launch(arguments("two", per_device_eval_batch_size=4, **settings), processes=2)
    assert run.returncode == 0, run.stderr
    two = json.loads((tmp_path / "two" / "eval_results.json").read_text())
    for part in ("loss", "energy_loss", "eos_loss"):
        assert two[f"eval_{part}"] == pytest.approx(one[f"eval_{part}"], abs=1e-5)


def test_sharded_weights_speak_no_samples_that_would_wait_for_other_processes(train, checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda: True)
    folder = train("sharded", model_name_or_path=checkpoint, do_train=None, do_eval=True, num_audio_samples=1)
    assert "No audio samples" in caplog.text and not (folder / "samples").exists()


def test_from_scratch_with_memory_saved(train, tmp_path):
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 2, "head_num_layers": 2, "head_hidden_size": 32, "noise_dim": 8}
    (tmp_path / "model.json").write_text(json.dumps(fields))
    folder = train(
        "scratch",
        config_name=tmp_path / "model.json",
        tokenizer_name=GOLDEN / "offline",
        codec_name=GOLDEN / "codec",
        max_steps=30,
        learning_rate=1e-2,
        bf16=True,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=30,
        num_audio_samples=1,
    )
    assert (folder / "samples" / "step-0000030" / "0.wav").is_file()
    log = read_log(folder)
    assert log[30]["loss"] < log[1]["loss"] - 0.5
    model = SledForSpeechSynthesis.from_pretrained(folder)
    processor = SledProcessor.from_pretrained(folder)
    assert (model.config.hidden_size, model.config.vocab_size, model.config.latent_dim) == (32, 760, 32)
    assert model.dtype == torch.float32
    expected = EncodecModel.from_pretrained(GOLDEN / "codec").state_dict()
    torch.testing.assert_close(model.codec.state_dict(), expected, rtol=0, atol=0)
    (audio,) = model.generate(**processor("Stop.", return_tensors="pt"), max_new_tokens=5)
    assert torch.isfinite(audio).all()


@pytest.mark.parametrize("trainer_class", [Trainer, SledTrainer])
def test_predictions_are_losses_and_ends_without_hidden_states(checkpoint, data, tmp_path, trainer_class):
    model, processor = load_model(SledModelArguments(str(checkpoint)))
    dataset = load_source(str(data)).sort("length")
    args = SledTrainingArguments(
        str(tmp_path),
        prediction_loss_only=False,
        label_names=["audio_codes_mask"],
        per_device_eval_batch_size=5,
        num_audio_samples=0,
        report_to="none",
        use_cpu=True,
    )

    def compute_metrics(prediction):
        *losses, eos_logits = sorted(prediction.predictions, key=np.ndim)
        frames = (prediction.label_ids == 1).sum(axis=1)
        return {
            "frames": int(frames.sum()),
            "losses_are_finite": bool(np.isfinite(losses).all()),
            "asked": int((eos_logits != -100).sum()),
        }

    trainer = trainer_class(
        model,
        args,
        SledDataCollator(processor),
        eval_dataset=dataset,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_frames"] == sum(dataset["length"][:])
    assert metrics["eval_losses_are_finite"] and metrics["eval_asked"] > metrics["eval_frames"]
    # Nothing that is kept of a position is wider than one number.
    predictions = trainer.predict(dataset).predictions
    assert sorted(map(np.ndim, predictions)) == [1, 1, 2] and max(map(len, predictions)) == 16


def test_offline_to_interleaved_and_back(train, checkpoint):
    folder = train("interleaved", model_name_or_path=checkpoint, text_chunk_size=5, speech_chunk_size=9)
    model = SledForSpeechSynthesis.from_pretrained(folder)
    assert (model.config.text_chunk_size, model.config.speech_chunk_size) == (5, 9)
    assert model.generation_config.eos_threshold == 0.5
    assert SledProcessor.from_pretrained(folder).tokenizer.padding_side == "right"
    folder = train("offline", model_name_or_path=folder, text_chunk_size=0, speech_chunk_size=0)
    model = SledForSpeechSynthesis.from_pretrained(folder)
    assert not model.config.is_interleaved and model.generation_config.eos_threshold == 0.8
    assert SledProcessor.from_pretrained(folder).tokenizer.padding_side == "left"


def test_lora_trains_adapters_and_saves_a_whole_model(train, checkpoint):
    folder = train("lora", model_name_or_path=checkpoint, lora_rank=4, save_strategy="steps", save_steps=3)
    saved = load_file(folder / "checkpoint-3" / "adapter_model.safetensors")
    assert saved and all("lora" in name for name in saved)
    before, after = (SledForSpeechSynthesis.from_pretrained(path).state_dict() for path in (checkpoint, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in changed)


LOAD_BY_NAME = """
import os
import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor, pipeline
from transformers_sled import SledForSpeechSynthesis, SledProcessor
speaker = pipeline("text-to-speech", model="somebody/voice")
assert isinstance(speaker.model, SledForSpeechSynthesis) and isinstance(speaker.processor, SledProcessor)
speech = speaker("Stop.", generate_kwargs={"max_new_tokens": 5, "min_new_tokens": 5})
assert speech["audio"].shape[-1] == 5 * 320 and speech["sampling_rate"] == 24_000
assert isinstance(AutoProcessor.from_pretrained("somebody/voice"), SledProcessor)
model = AutoModelForTextToWaveform.from_pretrained("somebody/voice")
saved = SledForSpeechSynthesis.from_pretrained(os.environ["SAVED"]).state_dict()
assert model.state_dict().keys() == saved.keys()
assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
"""


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2},
        {"hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2, "lora_rank": 4},
    ],
    ids=["end", "every_save", "lora"],
)
def test_pushed_at_the_end_and_loaded_by_name(arguments, checkpoint, tmp_path, settings):
    settings = {
        "model_name_or_path": checkpoint,
        "push_to_hub": True,
        "hub_model_id": "somebody/voice",
        "language": "de",
        "license": "cc-by-4.0",
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_audio_samples": 1,
        "report_to": "tensorboard",
        **settings,
    }
    with Hub() as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_of_nobody",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "home"),
            "SAVED": str(tmp_path / "run"),
        }
        run = launch(arguments("run", **settings), epilogue=LOAD_BY_NAME, environment=environment)
        assert run.returncode == 0, run.stderr
        files = hub.get_files("somebody/voice")
        commits = [files for _, files in hub.repositories["somebody/voice"]["main"]]
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    assert model_files | {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert "samples/step-0000004/0.wav" in files
    assert not [name for name in files if name.startswith(("adapter", "checkpoint"))]
    pushed_early = {"adapter_model.safetensors"} if "lora_rank" in settings else model_files
    assert any(pushed_early <= early.keys() and "README.md" not in early for early in commits) == (
        settings.get("hub_strategy") == "every_save"
    )
    text = files["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.language, card.data.license, card.data.pipeline_tag) == ("de", "cc-by-4.0", "text-to-speech")
    assert "\n# somebody/voice\n" in card.text and 'model="somebody/voice"' in card.text
    assert "No license is stated" not in card.text
    assert "| optimizer steps | 4 |" in card.text and "| evaluation energy loss |" in card.text
    for place in (tmp_path, checkpoint, GOLDEN, Path.home(), Path.cwd()):
        assert str(place) not in text


def test_the_card_names_a_public_dataset(checkpoint, tmp_path):
    model, processor = load_model(SledModelArguments(model_name_or_path=str(checkpoint)))
    args = SledTrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    trainer = SledTrainer(model, args, processing_class=processor)
    trainer.save_model()
    trainer.create_model_card(dataset="somebody/corpus", finetuned_from="somebody/voice")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.datasets, card.data.base_model) == (["somebody/corpus"], "somebody/voice")
    assert "Trained on somebody/corpus. No license is stated" in card.text and "Not stated" not in card.text


def test_a_finished_run_run_again_changes_only_its_card(train, checkpoint):
    settings = {"model_name_or_path": checkpoint, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    folder = train("run", **settings)
    before = load_file(folder / "model.safetensors")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## This run", "My own words.\n\n## This run"))
    train("run", **settings, license="mit")
    assert "My own words." in card.read_text() and ModelCard.load(card).data.license == "mit"
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_waveforms_instead_of_codes(train, checkpoint, data, tmp_path):
    rng = np.random.default_rng(1)
    folder = tmp_path / "audio"
    folder.mkdir()
    lines = ["file_name,text"]
    for index in range(6):
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.standard_normal(8000 + 500 * index), 24000)
        lines.append(f"{index}.wav,Sentence {index}.")
    (folder / "5.wav").write_bytes(b"no audio")
    (folder / "metadata.csv").write_text("\n".join(lines))
    run = train("waveforms", model_name_or_path=checkpoint, dataset_name=folder, max_steps=2)
    assert sorted(read_log(run)) == [1, 2]


def test_what_does_not_fit_is_left_out_and_named(checkpoint, data, tmp_path, caplog):
    model, processor = load_model(SledModelArguments(model_name_or_path=str(checkpoint)))
    model.config.max_position_embeddings = 40
    args = SledTrainingArguments(str(tmp_path), do_train=True, use_cpu=True)
    dataset, _ = load_splits(SledDataArguments(str(data)), args, model, processor)
    lengths = [
        len(processor(text)["input_ids"][0]) + n for text, n in zip(dataset["text"], dataset["length"], strict=True)
    ]
    assert 0 < len(lengths) < 16 and max(lengths) <= 40
    assert f"Left out {16 - len(lengths)} of 16" in caplog.text
    assert "u15" in caplog.text
    model.config.max_position_embeddings = 4
    with pytest.raises(ValueError, match="No utterance of split train"):
        load_splits(SledDataArguments(str(data)), args, model, processor)


def test_bad_input(train, checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match=r"--text_column_name must be one of the columns .* got 'sentence'"):
        train("a", model_name_or_path=checkpoint, text_column_name="sentence")
    with pytest.raises(ValueError, match="--tokenizer_name is needed"):
        train("b", codec_name=GOLDEN / "codec")
    with pytest.raises(ValueError, match="go together"):
        train("c", model_name_or_path=checkpoint, text_chunk_size=5)
    with pytest.raises(ValueError, match="go together"):
        train("c", model_name_or_path=checkpoint, text_chunk_size=5, speech_chunk_size=0)
    with pytest.raises(ValueError, match="Nothing to do"):
        train("d", model_name_or_path=checkpoint, do_train=None)
    other = EncodecModel(EncodecModel.from_pretrained(GOLDEN / "codec").config)
    for layer in other.quantizer.layers:
        layer.codebook.embed.normal_()
    other.save_pretrained(tmp_path / "other_codec")
    with pytest.raises(ValueError, match="codes of another codec"):
        train("e", model_name_or_path=checkpoint, codec_name=tmp_path / "other_codec")
    with pytest.raises(ValueError, match="--hub_token would be published"):
        train("f", model_name_or_path=checkpoint, hub_token="hf_of_nobody")
    config = json.loads((checkpoint / "config.json").read_text())
    other = shutil.copytree(checkpoint, tmp_path / "other_model")
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": 3}))
    with pytest.raises(ValueError, match=r"tokenizer that is not its model.s: `eos_token_id` is 2"):
        train("g", model_name_or_path=other)


def parse(*arguments):
    return parse_recipe([SledModelArguments, SledDataArguments, SledTrainingArguments], list(map(str, arguments)))


def test_a_recipe_is_read_and_overruled(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "dataset_name: codes\nlearning_rate: 5e-4\nmax_steps: 7\nbf16: false\nlogging_first_step: true\n"
    )
    _, data_args, training_args = parse(recipe, "--output_dir", tmp_path, "--max_steps", 3, "--use_cpu")
    assert (data_args.dataset_name, training_args.learning_rate, training_args.max_steps) == ("codes", 5e-4, 3)
    assert training_args.logging_first_step and not training_args.bf16
    recipe.write_text("learning_rat: 5e-4\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse(recipe, "--output_dir", tmp_path, "--dataset_name", "codes")


@pytest.mark.parametrize(
    ("recipe", "steps", "rate", "warmup"), [("offline", 300_000, 5e-4, 32_000), ("interleaved", 100_000, 3e-4, 10_000)]
)
def test_the_released_recipes(tmp_path, recipe, steps, rate, warmup):
    command = [RECIPES / f"{recipe}.yaml", "--dataset_name", "codes", "--output_dir", tmp_path, "--use_cpu"]
    model_args, _, args = parse(*command)
    assert (args.max_steps, args.learning_rate, args.warmup_steps) == (steps, rate, warmup)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.01, 1.0)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 512
    assert args.bf16 and args.lr_scheduler_type == "linear" and not args.remove_unused_columns
    chunks = (model_args.text_chunk_size, model_args.speech_chunk_size)
    assert chunks == ((5, 45) if recipe == "interleaved" else (None, None))


def test_batches_of_similar_length_come_in_any_order():
    lengths = torch.randint(10, 400, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = EpochLengthGroupedSampler(8, lengths, seed=0)
    indices = list(sampler)
    assert sorted(indices) == list(range(1003))
    batches = torch.tensor([lengths[index] for index in indices[:1000]]).view(125, 8).float()
    assert batches.std(dim=1).mean() < 0.2 * batches.std()
    # As the base class orders them, the correlation of a batch's length with the next one's is 0.9.
    means = batches.mean(dim=1)
    assert torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1].abs() < 0.3
    sampler.set_epoch(1)
    assert list(sampler) != indices
    sampler.set_epoch(0)
    assert list(sampler) == indices
