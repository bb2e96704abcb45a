"""
Training: data preparation, collator and trainer of SLED, tokenizer and codec, and the small voice's own training.

What needs more than the package itself (`pip install transformers-sled[train]`) is imported when it is first asked for.
"""

from importlib import import_module
from typing import Any


_PUBLIC_NAMES = {
    "aligned_trainer": ["AlignedTrainer", "AlignmentArguments"],
    "alignment": ["align_text"],
    "base_codec_trainer": ["CodecModelArguments", "create_codec"],
    "codec_change": ["change_codec"],
    "codec_trainer": ["CodecTrainer", "CodecTrainingArguments", "resynthesize"],
    "collator": ["SledDataCollator"],
    "commands": ["run_command"],
    "decoder_trainer": ["DecoderTrainer", "DecoderTrainingArguments"],
    "encoder_trainer": ["EncoderTrainer", "EncoderTrainingArguments"],
    "joins": ["join_utterances"],
    "labels": ["label_speech"],
    "latent_trainer": ["LatentDataArguments", "LatentTrainer", "LatentTrainingArguments", "load_labelled_data"],
    "models": ["SledModelArguments", "add_adapters", "load_model"],
    "preparation": ["PreparationArguments", "prepare_dataset"],
    "recipes": ["parse_recipe"],
    "segments": [
        "CodecDataArguments",
        "LatentSegments",
        "SpeechSegments",
        "decode_utterances",
        "encode_utterances",
        "load_codec_data",
    ],
    "sources": ["load_manifest", "load_source"],
    "splits": ["SledDataArguments", "load_splits"],
    "teacher": ["Teacher", "speak_texts"],
    "texts": ["read_wordnet", "read_words", "write_short_texts", "write_texts", "write_word_lists"],
    "tokenizer": ["TokenizerArguments", "train_tokenizer"],
    "trainer": ["SledTrainer", "SledTrainingArguments"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
