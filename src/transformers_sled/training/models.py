"""The model to train: from a checkpoint, from scratch, interleaved or not, with adapters or not."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, EncodecFeatureExtractor, EncodecModel, PreTrainedTokenizerBase

from ..configuration_sled import SledConfig
from ..modeling_sled import SledForSpeechSynthesis
from ..processing_sled import SledProcessor


@dataclass
class SledModelArguments:
    """Which model to train."""

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


def load_model(args: SledModelArguments) -> tuple[SledForSpeechSynthesis, SledProcessor]:
    """
    Loads or makes the model to train, in float32.

    Args:
        args ([`SledModelArguments`]):
            Which model.

    Returns:
        `tuple`: the [`SledForSpeechSynthesis`] and its [`SledProcessor`], whose tokenizer pads on the model's side.

    Raises:
        `ValueError`: If arguments do not go together, or the tokenizer is of another model.
    """
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
    _check_tokenizer(processor.tokenizer, model.config)
    return model, processor


def add_adapters(model: SledForSpeechSynthesis, args: SledModelArguments) -> SledForSpeechSynthesis | PeftModel:
    """
    Wraps the model so that low-rank adapters on the decoder's layers are trained instead of all weights.

    Args:
        model ([`SledForSpeechSynthesis`]):
            The model.
        args ([`SledModelArguments`]):
            The adapters' rank, scale and dropout.

    Returns:
        `PeftModel`, or the model as it is where `args.lora_rank` is 0.
    """
    if not args.lora_rank:
        return model
    lora = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=r"model\.layers\.\d+\..*_proj",
    )
    return get_peft_model(model, lora)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: SledConfig) -> None:
    for name in ("vocab_size", "bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) != getattr(config, name):
            raise ValueError(
                f"The tokenizer does not match the checkpoint: its {name} is {getattr(tokenizer, name)}, the "
                f"checkpoint's is {getattr(config, name)}"
            )
