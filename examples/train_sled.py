"""
Train SLED with the Trainer: from scratch, from a checkpoint, from an offline to an interleaved model, or with LoRA.

    python examples/train_sled.py examples/configs/offline.yaml --dataset_name my_codes/ --tokenizer_name my_tokenizer/ \
        --output_dir my_sled/

Every value of the YAML (or JSON) file is an argument and can be given, or given again, on the command line. Run the same
command again after an interruption and it goes on from the last checkpoint. `torchrun` and `accelerate launch` run it
on many GPUs.
"""

import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    EncodecFeatureExtractor,
    EncodecModel,
    HfArgumentParser,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from transformers_sled import SledConfig, SledForSpeechSynthesis, SledProcessor
from transformers_sled.data_sled import (
    DroppedItemError,
    SledDataCollator,
    audio_duration,
    codebooks_digest,
    load_source,
)
from transformers_sled.text_sled import encode_text


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from, on the Hub or local. Without it, from scratch."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "From scratch: JSON file of SledConfig fields. Without it, the released architecture."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "From scratch: the tokenizer."})
    codec_name: str | None = field(
        default=None, metadata={"help": "The EnCodec. Without it, the checkpoint's or facebook/encodec_24khz."}
    )
    text_chunk_size: int | None = field(
        default=None, metadata={"help": "Makes it interleaved: text tokens a chunk (5 in the paper). 0: offline."}
    )
    speech_chunk_size: int | None = field(
        default=None, metadata={"help": "Makes it interleaved: frames a chunk (45 in the paper). 0: offline."}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train low-rank adapters on the decoder's layers instead of all weights."}
    )
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, divided by their rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})


@dataclass
class DataArguments:
    dataset_name: str = field(
        metadata={"help": "Folder from prepare_data.py, or any dataset of audio and text (as for prepare_data.py)."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the text."})
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the audio, if there are no codes."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many utterances at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many at most."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that measure lengths."})
    num_audio_samples: int = field(
        default=4, metadata={"help": "Utterances of the evaluation split to speak at every evaluation."}
    )
    language: str | None = field(default=None, metadata={"help": "For the model card: code of the speech's language."})
    license: str | None = field(default=None, metadata={"help": "For the model card: the license of the model."})


@dataclass
class SledTrainingArguments(TrainingArguments):
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs text and audio."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation keeps losses, not hidden states."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Batches of similar speech length waste least on padding."}
    )
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "Every step uses every weight, so there are none to look for."}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Where to log to."})


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """Draws the order of an epoch from the seed and the epoch alone, so that a resumed run sees the same batches."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class SledTrainer(Trainer):
    """
    The Trainer, with both parts of the loss logged and every frame of an optimizer step weighted alike, however the
    step is spread over processes and accumulated batches. The loss of an evaluation depends on neither its batches nor
    the number of processes.
    """

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
        return batch["padding_mask"][:, :: self.accelerator.unwrap_model(self.model).codec.config.hop_length]

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
        noise = torch.zeros(2, *mask.shape, self.accelerator.unwrap_model(self.model).config.noise_dim)
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


class AudioSamples(TrainerCallback):
    """Speaks a few utterances at every evaluation: wav and spectrogram files under `samples/`, and TensorBoard."""

    def __init__(self, trainer: Trainer, processor: SledProcessor, examples: list[dict[str, Any]]):
        self.trainer = trainer
        self.processor = processor
        self.examples = examples

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        model = plain_model(self.trainer.accelerator.unwrap_model(self.trainer.model))
        was_training = model.training
        model.eval()
        folder = Path(args.output_dir) / "samples" / f"step-{state.global_step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, example in enumerate(self.examples):
            inputs = self.processor(text=example["text"], return_tensors="pt").to(model.device)
            audio = model.generate(
                **inputs,
                # A model that has not learned the end of speech would go on to the last position.
                max_new_tokens=2 * example["length"],
                generator=torch.Generator(model.device).manual_seed(index),
            )[0].cpu()
            self.processor.save_audio(audio, folder / f"{index}.wav")
            (folder / f"{index}.txt").write_text(example["text"] + "\n")
            figure = spectrogram(audio, self.processor.sampling_rate, example["text"])
            figure.savefig(folder / f"{index}.png")
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                    writer = callback.tb_writer
                    if len(audio):
                        writer.add_audio(f"sample/{index}", audio, state.global_step, self.processor.sampling_rate)
                    writer.add_figure(f"sample/{index}", figure, state.global_step)
        model.train(was_training)


def spectrogram(audio: torch.Tensor, sampling_rate: int, title: str) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="Hz", title=title[:80])
    if len(audio) > 1024:
        axes.specgram(audio.numpy(), NFFT=1024, Fs=sampling_rate, noverlap=768, vmin=-160)
    return figure


def plain_model(model: torch.nn.Module) -> SledForSpeechSynthesis:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_model(args: ModelArguments) -> tuple[SledForSpeechSynthesis, SledProcessor]:
    if args.text_chunk_size != args.speech_chunk_size and not (args.text_chunk_size and args.speech_chunk_size):
        raise ValueError("--text_chunk_size and --speech_chunk_size go together")
    chunks = {"text_chunk_size": args.text_chunk_size or None, "speech_chunk_size": args.speech_chunk_size or None}
    if args.model_name_or_path is not None:
        if args.config_name or args.tokenizer_name:
            raise ValueError(
                "--config_name and --tokenizer_name are for training from scratch; a checkpoint has its own"
            )
        model = SledForSpeechSynthesis.from_pretrained(
            args.model_name_or_path, codec=args.codec_name, dtype=torch.float32
        )
        processor = SledProcessor.from_pretrained(args.model_name_or_path)
        if args.text_chunk_size is not None:
            model.config.update(chunks)
            # The end of speech has another threshold where it is asked at every frame.
            model.generation_config.eos_threshold = None
            model.fill_generation_config()
    else:
        if args.tokenizer_name is None:
            raise ValueError("--tokenizer_name is needed to train from scratch; see train_tokenizer.py")
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        codec = EncodecModel.from_pretrained(args.codec_name or "facebook/encodec_24khz")
        fields = json.loads(Path(args.config_name).read_text()) if args.config_name else {}
        if args.text_chunk_size is not None:
            fields |= chunks
        config = SledConfig(
            **{
                **fields,
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "latent_dim": codec.config.hidden_size,
            }
        )
        model = SledForSpeechSynthesis(config, build_codec=False)
        model.set_codec(codec)
        processor = SledProcessor(
            EncodecFeatureExtractor(sampling_rate=codec.config.sampling_rate),
            tokenizer,
            hop_length=codec.config.hop_length,
            max_position_embeddings=config.max_position_embeddings,
        )
    processor.tokenizer.padding_side = "right" if model.config.is_interleaved else "left"
    check_tokenizer(processor.tokenizer, model.config)
    return model, processor


def check_tokenizer(tokenizer: Any, config: SledConfig) -> None:
    for name in ("vocab_size", "bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) != getattr(config, name):
            raise ValueError(
                f"The tokenizer does not match the checkpoint: its {name} is {getattr(tokenizer, name)}, the "
                f"checkpoint's is {getattr(config, name)}"
            )


def check_codes(folder: Path, split: str, model: SledForSpeechSynthesis) -> None:
    """Codes mean something only with the codebooks they index."""
    settings_path = folder / "preparation" / f"{split}.json"
    if not settings_path.is_file():
        return
    settings = json.loads(settings_path.read_text())
    if settings["codebooks_sha256"] != codebooks_digest(model.codec, model.config.codec_bandwidth):
        raise ValueError(
            f"{folder} holds codes of another codec ({settings['codec']} at {settings['bandwidth']} kbit/s) than the "
            f"model's ({model.config.codec_bandwidth} kbit/s): prepare it with the model's codec"
        )


def load_split(
    args: DataArguments, split: str, max_samples: int | None, model: SledForSpeechSynthesis, processor: SledProcessor
) -> datasets.Dataset:
    """Opens a split as `id`, `text`, `length` and either `audio_codes` or `audio`, without what does not fit."""
    dataset = load_source(args.dataset_name, args.dataset_config_name, split)
    has_codes = "audio_codes" in dataset.column_names
    speech_column = "audio_codes" if has_codes else args.audio_column_name
    for flag, column in (("--text_column_name", args.text_column_name), ("--audio_column_name", speech_column)):
        if column not in dataset.column_names:
            raise ValueError(
                f"{flag} must be one of the columns {dataset.column_names} of split {split}, got {column!r}"
            )
    if has_codes:
        check_codes(Path(args.dataset_name), split, model)
    columns = {args.text_column_name: "text", speech_column: "audio_codes" if has_codes else "audio"}
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    wanted = ("id", "text", "length", "audio_codes") if has_codes else ("id", "text", "audio")
    dataset = dataset.select_columns([column for column in wanted if column in dataset.column_names])
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))

    frame_rate = model.codec.config.sampling_rate / model.codec.config.hop_length

    def measure(batch: dict[str, list]) -> dict[str, list[int]]:
        frames = batch["length"] if has_codes else [count_frames(audio, frame_rate) for audio in batch["audio"]]
        # 0 marks what cannot be used: no text or no readable speech.
        positions = [
            len(encode_text(processor.tokenizer, text)) + length if text and text.strip() and length else 0
            for text, length in zip(batch["text"], frames, strict=True)
        ]
        return {"frames": frames, "positions": positions}

    needed = dataset.select_columns(["text", "length" if has_codes else "audio"])
    measured = needed.map(
        measure,
        batched=True,
        remove_columns=needed.column_names,
        num_proc=args.preprocessing_num_workers,
        desc=f"Measuring {split}",
    )
    limit = model.config.max_position_embeddings
    positions = measured["positions"][:]
    unusable = [index for index, count in enumerate(positions) if not 0 < count <= limit]
    if not has_codes:
        dataset = dataset.add_column("length", measured["frames"][:])
    if unusable:
        names = dataset.select(unusable[:10])["id"][:] if "id" in dataset.column_names else unusable[:10]
        logger.warning(
            "Left out %d of %d utterances of %s, without text or readable speech or with more than %d tokens and frames: %s%s",
            len(unusable), len(dataset), split, limit, names, ", ..." if len(unusable) > 10 else "",
        )  # fmt: skip
        unusable_set = set(unusable)
        dataset = dataset.select([index for index in range(len(dataset)) if index not in unusable_set])
    if len(dataset) == 0:
        raise ValueError(f"No utterance of split {split} of {args.dataset_name} can be used")
    return dataset


def count_frames(audio: Any, frame_rate: float) -> int:
    try:
        return math.ceil(audio_duration(audio) * frame_rate)
    except DroppedItemError as error:
        logger.warning("Left out: %s", error)
        return 0


def last_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint that was written to its end: the Trainer writes the state last."""
    checkpoints = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return str(max(checkpoints, key=lambda path: int(path.name.split("-")[1]))) if checkpoints else None


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, SledTrainingArguments]:
    parser = HfArgumentParser((ModelArguments, DataArguments, SledTrainingArguments))
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        given = yaml.safe_load(Path(arguments[0]).read_text())
        actions = {action.dest: action for action in parser._actions}
        if unknown := sorted(set(given) - set(actions)):
            raise ValueError(f"{arguments[0]} has keys that are no arguments: {unknown}")
        parser.set_defaults(**given)
        for name in given:
            actions[name].required = False
        arguments = arguments[1:]
    return parser.parse_args_into_dataclasses(arguments)


def main(
    arguments: list[str] | None = None, trainer_class: type[SledTrainer] = SledTrainer, **trainer_kwargs: Any
) -> None:
    model_args, data_args, training_args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        level=logging.INFO if training_args.should_log else logging.ERROR,
    )
    do_train, do_eval = training_args.do_train, training_args.do_eval or training_args.eval_strategy != "no"
    if not do_train and not do_eval:
        raise ValueError("Nothing to do: give --do_train, --do_eval or both")
    if training_args.hub_token is not None:
        raise ValueError(
            "--hub_token would be published with training_args.bin: set the environment variable HF_TOKEN or run "
            "`hf auth login` instead"
        )
    set_seed(training_args.seed)
    model, processor = load_model(model_args)
    with training_args.main_process_first(desc="reading the data"):
        train_dataset = eval_dataset = None
        if do_train:
            train_dataset = load_split(
                data_args, data_args.train_split_name, data_args.max_train_samples, model, processor
            )
        if do_eval:
            eval_dataset = load_split(
                data_args, data_args.eval_split_name, data_args.max_eval_samples, model, processor
            )
    if model_args.lora_rank:
        lora = LoraConfig(
            r=model_args.lora_rank,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=r"model\.layers\.\d+\..*_proj",
        )
        model = get_peft_model(model, lora)

    trainer = trainer_class(
        model=model,
        args=training_args,
        data_collator=SledDataCollator(processor),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        **trainer_kwargs,
    )
    if eval_dataset is not None and data_args.num_audio_samples:
        if trainer.is_fsdp_enabled:
            logger.warning("No audio samples: a model sharded by FSDP speaks from its saved checkpoints only")
        else:
            examples = eval_dataset.select_columns(["text", "length"])
            examples = examples.select(range(min(data_args.num_audio_samples, len(examples)))).to_list()
            trainer.add_callback(AudioSamples(trainer, processor, examples))

    if do_train:
        checkpoint = training_args.resume_from_checkpoint or last_checkpoint(training_args.output_dir)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        if model_args.lora_rank:
            trainer.model = trainer.model.merge_and_unload()
            trainer.delete_adapters()
        trainer.save_model()
    if do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    card = {
        "language": data_args.language,
        "license": data_args.license,
        "finetuned_from": model_args.model_name_or_path,
        "dataset": data_args.dataset_name,
    }
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    elif do_train:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
