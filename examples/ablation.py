"""
The paper's ablation in miniature: overfit a small model to a few utterances with and without the repulsive term of the
energy distance, and measure how far apart the two samples of a frame lie and how much of the speech is understood.

    python examples/ablation.py --dataset_name my_codes/ --tokenizer_name my_tokenizer/ --codec_name my_codec/ \
        --recognizer openai/whisper-tiny.en --output_dir ablation/

Writes `ablation.json`, `ablation.png` and what both models say.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import jiwer
import soxr
import torch
from matplotlib.figure import Figure
from transformers import (
    AutoTokenizer,
    EncodecFeatureExtractor,
    EncodecModel,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from transformers_sled import SledConfig, SledForSpeechSynthesis, SledProcessor
from transformers_sled.data_sled import SledDataCollator, load_source


@dataclass
class AblationArguments:
    dataset_name: str = field(metadata={"help": "Folder from prepare_data.py."})
    tokenizer_name: str = field(metadata={"help": "The tokenizer."})
    codec_name: str = field(metadata={"help": "The EnCodec that the codes are of."})
    output_dir: str = field(metadata={"help": "Folder to write to."})
    recognizer: str | None = field(default=None, metadata={"help": "Speech recognizer to measure word errors with."})
    split: str = field(default="train", metadata={"help": "Split to take the utterances from."})
    num_utterances: int = field(default=8, metadata={"help": "The shortest so many utterances are learned."})
    max_steps: int = field(default=1500, metadata={"help": "Optimizer steps."})
    measure_steps: int = field(default=50, metadata={"help": "How often the spread is measured."})
    hidden_size: int = field(default=256, metadata={"help": "Width of decoder and head."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the decoder."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate, falling to zero by a cosine."})


class SameNoiseCollator(SledDataCollator):
    """Gives both samples of a frame the same noise, which leaves the energy distance without its repulsive term."""

    def __init__(self, processor: SledProcessor, noise_dim: int):
        super().__init__(processor)
        self.noise_dim = noise_dim

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        noise = torch.randn(1, *batch["audio_codes_mask"].shape, self.noise_dim)
        return {**batch, "noise": noise.expand(2, -1, -1, -1)}


class SpreadCallback(TrainerCallback):
    """Measures how far apart the two samples of a frame lie, on average over frames."""

    def __init__(self, batch: dict[str, Any], every: int):
        self.batch = batch
        self.every = every
        self.spread: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step in (1, state.max_steps):
            self.spread[state.global_step] = measure_spread(model, self.batch)


@torch.no_grad()
def measure_spread(model: SledForSpeechSynthesis, batch: dict[str, Any]) -> float:
    """
    Mean distance of two samples of a frame, from three energy losses: with the noises (a, b) the loss is
    |a - z| + |b - z| - |a - b|, and with (a, a) it is 2 |a - z|.
    """
    was_training = model.training
    model.eval()
    shape = (*batch["audio_codes_mask"].shape, model.config.noise_dim)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, *shape, generator=generator).to(model.device)
    inputs = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
    both, first_twice, second_twice = (
        model(**inputs, noise=torch.stack(pair)).energy_loss.item()
        for pair in ((first, second), (first, first), (second, second))
    )
    model.train(was_training)
    return (first_twice + second_twice) / 2 - both


def train(
    args: AblationArguments, repulsion: bool, dataset: datasets.Dataset, processor: SledProcessor, codec: EncodecModel
) -> tuple[SledForSpeechSynthesis, dict[int, float]]:
    """Trains one model from scratch and returns it with the spread at every measured step."""
    set_seed(0)
    heads = max(1, args.hidden_size // 64)
    config = SledConfig(
        vocab_size=processor.tokenizer.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_hidden_size=args.hidden_size,
        head_num_layers=3,
        latent_dim=codec.config.hidden_size,
        codec_bandwidth=json.loads((Path(args.dataset_name) / "preparation" / f"{args.split}.json").read_text())[
            "bandwidth"
        ],
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
    )
    model = SledForSpeechSynthesis(config, build_codec=False)
    model.set_codec(codec)
    collator = SledDataCollator(processor)
    callback = SpreadCallback(collator(list(dataset)), args.measure_steps)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(Path(args.output_dir) / "runs"),
            max_steps=args.max_steps,
            per_device_train_batch_size=len(dataset),
            learning_rate=args.learning_rate,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            lr_scheduler_type="cosine",
            warmup_steps=args.max_steps // 20,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            logging_steps=args.measure_steps,
        ),
        collator if repulsion else SameNoiseCollator(processor, config.noise_dim),
        train_dataset=dataset,
        callbacks=[callback],
    )
    trainer.train()
    return model.eval(), callback.spread


def speak(
    model: SledForSpeechSynthesis, processor: SledProcessor, dataset: datasets.Dataset, folder: Path
) -> list[torch.Tensor]:
    """Speaks every utterance's text to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    audios = []
    for index, example in enumerate(dataset):
        inputs = processor(example["text"], return_tensors="pt").to(model.device)
        (audio,) = model.generate(
            **inputs,
            # So few utterances leave the unconditional branch of guidance nothing to learn.
            guidance_scale=1.0,
            max_new_tokens=2 * example["length"],
            generator=torch.Generator(model.device).manual_seed(index),
        )
        audios.append(audio.cpu())
        processor.save_audio(audios[-1], folder / f"{index}.wav")
    return audios


def word_error_rate(recognizer: Any, audios: list[torch.Tensor], texts: list[str], sampling_rate: int) -> float:
    normalize = BasicTextNormalizer()
    rate = recognizer.feature_extractor.sampling_rate
    heard = [
        recognizer({"raw": soxr.resample(audio.numpy(), sampling_rate, rate), "sampling_rate": rate})["text"]
        if len(audio)
        else ""
        for audio in audios
    ]
    return jiwer.wer([normalize(text) for text in texts], [normalize(text) for text in heard])


def draw(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="mean distance of two samples of a frame")
    for name, result in results.items():
        errors = result.get("word_error_rate")
        label = name if errors is None else f"{name} (word error rate {errors:.0%})"
        axes.plot([int(step) for step in result["spread"]], list(result["spread"].values()), label=label)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def run(args: AblationArguments) -> dict[str, Any]:
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    dataset = load_source(args.dataset_name, split=args.split).sort("length")
    dataset = dataset.select(range(min(args.num_utterances, len(dataset))))
    codec = EncodecModel.from_pretrained(args.codec_name)
    processor = SledProcessor(
        EncodecFeatureExtractor(sampling_rate=codec.config.sampling_rate),
        AutoTokenizer.from_pretrained(args.tokenizer_name, padding_side="left"),
        hop_length=codec.config.hop_length,
    )
    recognizer = pipeline("automatic-speech-recognition", model=args.recognizer) if args.recognizer else None
    results: dict[str, Any] = {}
    for name, repulsion in (("with the repulsive term", True), ("without it", False)):
        model, spread = train(args, repulsion, dataset, processor, codec)
        audios = speak(model, processor, dataset, output_dir / name.replace(" ", "_"))
        results[name] = {"spread": spread}
        if recognizer is not None:
            results[name]["word_error_rate"] = word_error_rate(
                recognizer, audios, dataset["text"][:], processor.sampling_rate
            )
    (output_dir / "ablation.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results).savefig(output_dir / "ablation.png", dpi=150)
    return results


def main() -> None:
    (args,) = HfArgumentParser(AblationArguments).parse_args_into_dataclasses()
    for name, result in run(args).items():
        last = list(result["spread"].values())[-1]
        print(f"{name}: spread {last:.3f}, word error rate {result.get('word_error_rate', 'not measured')}")


if __name__ == "__main__":
    main()
