"""
The paper's ablation in miniature: overfit a small model to a few utterances with and without the repulsive term of the
energy distance, and measure how far apart the two samples of a frame lie.

    python examples/ablation.py examples/configs/ablation.yaml --dataset_name my_codes/ --tokenizer_name my_tokenizer/ \
        --codec_name my_codec/ --output_dir ablation/

Learns a batch of the shortest utterances. Writes `ablation.json`, `ablation.png` and what both models say.
"""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback, set_seed

from transformers_sled import SledForSpeechSynthesis, SledProcessor
from transformers_sled import training as sled


class SameNoiseCollator(sled.SledDataCollator):
    """Gives both samples of a frame the same noise, which leaves the energy distance without its repulsive term."""

    def __init__(self, processor: SledProcessor, noise_dim: int):
        super().__init__(processor)
        self.noise_dim = noise_dim

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        noise = torch.randn(1, *batch["audio_codes_mask"].shape, self.noise_dim)
        return {**batch, "noise": noise.expand(2, -1, -1, -1)}


class SpreadCallback(TrainerCallback):
    """Measures the mean distance of two samples of a frame."""

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch
        self.spread: dict[int, float] = {}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % args.logging_steps and state.global_step not in (1, state.max_steps):
            return
        model.eval()
        shape = (*self.batch["audio_codes_mask"].shape, model.config.noise_dim)
        first, second = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(model.device)
        inputs = {name: value.to(model.device) for name, value in self.batch.items() if torch.is_tensor(value)}
        # With the noises (a, b) the loss is |a - z| + |b - z| - |a - b|, and with (a, a) it is 2 |a - z|.
        pairs = ((first, first), (second, second), (first, second))
        *twice, both = (model(**inputs, noise=torch.stack(pair)).energy_loss.item() for pair in pairs)
        self.spread[state.global_step] = sum(twice) / 2 - both
        model.train()


def speak(model: SledForSpeechSynthesis, processor: SledProcessor, dataset: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, example in enumerate(dataset):
        (audio,) = model.generate(
            **processor(example["text"], return_tensors="pt").to(model.device),
            # So few utterances leave the unconditional branch of guidance nothing to learn.
            guidance_scale=1.0,
            max_new_tokens=2 * example["length"],
            generator=torch.Generator(model.device).manual_seed(index),
        )
        processor.save_audio(audio.cpu(), folder / f"{index}.wav")


def main() -> None:
    types = [sled.SledModelArguments, sled.SledDataArguments, sled.SledTrainingArguments]
    model_args, data_args, args = sled.parse_recipe(types)
    output_dir, spread = Path(args.output_dir), {}
    axes = Figure(figsize=(7, 3.5), layout="constrained").add_subplot(
        xlabel="optimizer step", ylabel="mean distance of two samples of a frame"
    )
    for name, has_repulsion in (("with the repulsive term", True), ("without it", False)):
        set_seed(args.seed)
        model, processor = sled.load_model(model_args)
        dataset = sled.load_splits(data_args, args, model, processor)[0].sort("length")
        dataset = dataset.select(range(min(args.per_device_train_batch_size, len(dataset))))
        collator = sled.SledDataCollator(processor)
        callback = SpreadCallback(collator(list(dataset)))
        if not has_repulsion:
            collator = SameNoiseCollator(processor, model.config.noise_dim)
        sled.SledTrainer(model, args, collator, dataset, callbacks=[callback]).train()
        speak(model.eval(), processor, dataset, output_dir / name.replace(" ", "_"))
        spread[name] = callback.spread
        axes.plot(list(callback.spread), list(callback.spread.values()), label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.figure.savefig(output_dir / "ablation.png", dpi=150)
    (output_dir / "ablation.json").write_text(json.dumps(spread, indent=2) + "\n")


if __name__ == "__main__":
    sled.run_command(main)
