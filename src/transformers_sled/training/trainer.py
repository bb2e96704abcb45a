"""The Trainer for SLED: losses that depend on no batching, speech at every evaluation, resuming, a card."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import HfApi, ModelCard
from matplotlib.figure import Figure
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from ..modeling_sled import SledForSpeechSynthesis


logger = logging.getLogger(__name__)


@dataclass
class SledTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with the defaults that SLED needs, and what a card and samples of speech need."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs text and audio."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation keeps losses, not hidden states."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Batches of similar speech length waste least on padding."}
    )
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "Every step uses every weight, so there are none to look for."}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Where to log to."})
    num_audio_samples: int = field(
        default=4, metadata={"help": "Utterances of the evaluation split to speak at every evaluation."}
    )
    language: str | None = field(default=None, metadata={"help": "For the model card: code of the speech's language."})
    license: str | None = field(default=None, metadata={"help": "For the model card: the license of the model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hub_token is not None:
            raise ValueError(
                "--hub_token would be published with training_args.bin: set the environment variable HF_TOKEN or run "
                "`hf auth login` instead"
            )


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """
    Draws the order of an epoch from the seed and the epoch alone, so that a resumed run sees the same batches. Batches of
    all lengths follow each other, where those of the base class go from long to short, fifty at a time.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        # What is left of a batch stays at the end.
        num_whole = len(indices) // self.batch_size
        order = torch.randperm(num_whole, generator=self.generator).tolist()
        for batch in [*order, num_whole]:
            yield from indices[batch * self.batch_size : (batch + 1) * self.batch_size]


class SledTrainer(Trainer):
    """
    The [`Trainer`], with both parts of the loss logged and every frame of an optimizer step weighted alike, however the
    step is spread over processes and accumulated batches. The loss of an evaluation depends on neither its batches nor
    the number of processes. At every evaluation a few utterances are spoken, to `samples/` and TensorBoard.

    Args:
        args, kwargs:
            As for [`Trainer`], with [`SledTrainingArguments`], a [`SledDataCollator`] and the [`SledProcessor`] as
            `processing_class`. A dataset has `text`, `length` (in frames) and `audio_codes` or `audio`.

    Example:

    ```python
    >>> from transformers_sled.training import SledDataCollator, SledTrainer, SledTrainingArguments, load_source

    >>> args = SledTrainingArguments("my_sled", max_steps=1000)  # doctest: +SKIP
    >>> trainer = SledTrainer(
    ...     model, args, SledDataCollator(processor), load_source("my_codes/"), processing_class=processor
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    # The base class has no types.
    model: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.loss_sums = {training: torch.zeros(4, device=self.args.device) for training in (True, False)}

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> torch.utils.data.Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return EpochLengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            list(train_dataset[self.args.length_column_name]),
            self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def get_frame_mask(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """1 for a frame of a row of a batch, 0 for padding, of shape `(batch, frames)`."""
        if "audio_codes_mask" in batch:
            return batch["audio_codes_mask"]
        return batch["padding_mask"][:, :: self.get_plain_model().get_codec().config.hop_length]

    def count_positions(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Frames of a batch, and frames with the end of every row: what the two losses are averaged over."""
        frames = self.get_frame_mask(batch).sum(dim=1)
        return torch.stack([frames.sum(), frames.sum() + len(frames)])

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        positions = torch.stack([self.count_positions(batch) for batch in batches]).sum(dim=0).to(device)
        return batches, self.accelerator.reduce(positions, reduction="sum")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        num_rows = len(inputs["input_ids"])
        if not model.training:
            num_rows = self.count_unrepeated_rows(num_rows)
            # A process with repeated rows only still takes part in the step: a sharded model needs it.
            kept = max(num_rows, 1)
            inputs = {name: value[:kept] if torch.is_tensor(value) else value for name, value in inputs.items()}
            inputs["noise"] = self.draw_evaluation_noise(inputs)
        outputs = model(**inputs)
        losses = torch.stack([outputs.energy_loss.mean(), outputs.eos_loss.mean()])
        positions = self.count_positions(inputs).to(losses.device) * (num_rows > 0)
        self.loss_sums[model.training] += torch.stack([losses.detach() * positions, positions]).flatten()
        loss = losses.sum()
        if num_items_in_batch is not None:
            # Gradients are averaged over processes and summed over accumulated batches.
            loss = (losses * positions / num_items_in_batch).sum() * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def count_unrepeated_rows(self, num_rows: int) -> int:
        """Rows of this process's batch without those that fill up the last step, so that every process has a batch."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return num_rows
        return min(max(state.remainder - self.accelerator.process_index * num_rows, 0), num_rows)

    def draw_evaluation_noise(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Noise that follows from a row's text alone: the same at every evaluation, however the rows are batched."""
        mask = self.get_frame_mask(batch)
        noise = torch.zeros(2, *mask.shape, self.get_plain_model().config.noise_dim)
        seeds = (batch["input_ids"] * batch["attention_mask"]).sum(dim=1) + self.args.seed
        for row, (seed, frames) in enumerate(zip(seeds.tolist(), mask.sum(dim=1).tolist(), strict=True)):
            generator = torch.Generator().manual_seed(seed)
            noise[:, row, :frames] = torch.randn(2, frames, noise.shape[-1], generator=generator)
        return noise

    def pop_mean_losses(self, training: bool) -> tuple[float, float]:
        """Means of the energy and end-of-speech losses over all positions since the last call, over all processes."""
        energy, eos, frames, positions = self.accelerator.reduce(self.loss_sums[training], reduction="sum").tolist()
        self.loss_sums[training] = torch.zeros(4, device=self.args.device)
        return energy / max(frames, 1), eos / max(positions, 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["energy_loss"], logs["eos_loss"] = self.pop_mean_losses(training=True)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        # The data loader draws a seed for its workers, which would otherwise change the training run's randomness.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        energy, eos = self.pop_mean_losses(training=False)
        output.metrics[f"{metric_key_prefix}_loss"] = energy + eos
        output.metrics[f"{metric_key_prefix}_energy_loss"] = energy
        output.metrics[f"{metric_key_prefix}_eos_loss"] = eos
        return output

    def run(self, dataset: str | None = None, finetuned_from: str | None = None) -> None:
        """
        Trains from the last checkpoint to the end, evaluates, saves and publishes, as far as the arguments ask for it.

        Args:
            dataset (`str`, *optional*):
                Name of the dataset, for the card.
            finetuned_from (`str`, *optional*):
                Name of the model that was started from, for the card.
        """
        args = self.args
        if args.do_train:
            result = self.train(resume_from_checkpoint=args.resume_from_checkpoint or self.get_last_checkpoint())
            self.save_state()
            self.log_metrics("train", result.metrics)
            self.save_metrics("train", result.metrics)
            if hasattr(self.model, "merge_and_unload"):
                self.model = self.model.merge_and_unload()
                self.delete_adapters()
            self.save_model()
        if self.eval_dataset is not None:
            metrics = self.evaluate()
            self.log_metrics("eval", metrics)
            self.save_metrics("eval", metrics)
        card = {
            "language": args.language,
            "license": args.license,
            "finetuned_from": finetuned_from,
            "dataset": dataset,
        }
        if args.push_to_hub:
            self.push_to_hub(**card)
        elif args.do_train:
            self.create_model_card(**card)

    def get_last_checkpoint(self) -> str | None:
        """The last checkpoint that was written to its end: the Trainer writes the state last."""
        checkpoints = [path.parent for path in Path(self.args.output_dir).glob("checkpoint-*/trainer_state.json")]
        return str(max(checkpoints, key=lambda path: int(path.name.split("-")[1]))) if checkpoints else None

    def get_plain_model(self) -> SledForSpeechSynthesis:
        """The model without what trains it: distributed wrappers and adapters' class."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        spoken = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(spoken, datasets.Dataset) and {"text", "length"} <= set(spoken.column_names):
            self.save_audio_samples(spoken)
        return metrics

    def save_audio_samples(self, dataset: datasets.Dataset) -> None:
        """Speaks the first utterances: wav and spectrogram files under `samples/`, and TensorBoard."""
        args, processor, step = self.args, self.processing_class, self.state.global_step
        if not self.is_world_process_zero() or processor is None or not args.num_audio_samples:
            return
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            # One process would wait for the weights of the others, which do not speak.
            logger.warning(
                "No audio samples: a model whose weights are sharded speaks from its saved checkpoints only"
            )
            return
        model = self.get_plain_model()
        was_training = model.training
        model.eval()
        folder = Path(args.output_dir) / "samples" / f"step-{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        examples = dataset.select_columns(["text", "length"])
        for index, example in enumerate(examples.select(range(min(args.num_audio_samples, len(examples))))):
            inputs = processor(text=example["text"], return_tensors="pt").to(model.device)
            audio = model.generate(
                **inputs,
                # A model that has not learned the end of speech would go on to the last position.
                max_new_tokens=2 * example["length"],
                generator=torch.Generator(model.device).manual_seed(index),
            )[0].cpu()
            processor.save_audio(audio, folder / f"{index}.wav")
            (folder / f"{index}.txt").write_text(example["text"] + "\n")
            figure = spectrogram(audio, processor.sampling_rate, example["text"])
            figure.savefig(folder / f"{index}.png")
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    if len(audio):
                        callback.tb_writer.add_audio(f"sample/{index}", audio, step, processor.sampling_rate)
                    callback.tb_writer.add_figure(f"sample/{index}", figure, step)
        model.train(was_training)

    def delete_adapters(self) -> None:
        """Deletes the adapters pushed during training: loading prefers them to the merged model beside them."""
        if not self.is_world_process_zero():
            return
        self._finish_current_push()
        names = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
        for name in names:
            Path(self.args.output_dir, name).unlink(missing_ok=True)
        if self.hub_model_id is not None:
            repository = {"repo_id": self.hub_model_id, "revision": self.args.hub_revision}
            pushed = [name for name in names if HfApi().file_exists(filename=name, **repository)]
            if pushed:
                HfApi().delete_files(delete_patterns=pushed, commit_message="Adapters are merged", **repository)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds to the card that the model is saved with what this run knows: data, settings and losses."""
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        if self.hub_model_id is not None:
            # The model was saved under the name of its folder.
            folder = path.resolve().parent.name
            card.text = card.text.replace(f"\n# {folder}\n", f"\n# {self.hub_model_id}\n", 1)
            card.text = card.text.replace(f'model="{folder}"', f'model="{self.hub_model_id}"')
        card.data.language = language or card.data.language
        if license is not None:
            card.data.license = license
            card.text = card.text.replace(" No license is stated for the weights.", "")
        # Folders of this machine mean nothing to a reader of the card.
        if dataset is not None and not Path(dataset).exists():
            known = card.data.datasets or []
            card.data.datasets = known if dataset in known else [*known, dataset]
            card.text = re.sub(r"Not stated: .* above\.", f"Trained on {dataset}.", card.text)
        if finetuned_from is not None and not Path(finetuned_from).exists():
            card.data.base_model = finetuned_from
        args, rows = self.args, []
        schedule = SchedulerType(args.lr_scheduler_type).value
        if self.train_dataset is not None:
            rows += [
                ("utterances", len(self.train_dataset)),
                ("optimizer steps", self.state.global_step),
                ("utterances a step", self.get_total_train_batch_size(args)),
                (
                    "learning rate",
                    f"{args.learning_rate}, {schedule}, {args.warmup_steps} warm-up steps",
                ),
                ("AdamW", f"betas {args.adam_beta1} and {args.adam_beta2}, weight decay {args.weight_decay}"),
                ("gradient norm", f"at most {args.max_grad_norm}"),
                ("precision", "bfloat16" if args.bf16 else "float32"),
            ]
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        if evaluations:
            rows += [
                (f"evaluation {part.replace('_', ' ')}", f"{evaluations[-1][f'eval_{part}']:.4f}")
                for part in ("energy_loss", "eos_loss")
            ]
        table = "".join(f"| {name} | {value} |\n" for name, value in rows)
        heading = "\n## This run\n"
        card.text = card.text.split(heading)[0].rstrip() + f"\n{heading}\n| | |\n| --- | --- |\n{table}"
        card.save(path)


def spectrogram(audio: torch.Tensor, sampling_rate: int, title: str) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="Hz", title=title[:80])
    if len(audio) > 1024:
        axes.specgram(audio.numpy(), NFFT=1024, Fs=sampling_rate, noverlap=768, vmin=-160)
    return figure
