"""Convert a CTranslate2 Whisper model, as faster-whisper uses it, to a transformers checkpoint.

Some machines have Whisper only in the CTranslate2 format; converted, the same weights run in
`pipeline("automatic-speech-recognition")`:

    python evaluation/convert_whisper.py faster-whisper-base whisper-base-transformers

CTranslate2 has no Python reader for its own `model.bin`, so its layout is read here (binary version 6,
`ctranslate2/specs/model_spec.py`). Weights have to be float32 or float16: an int8 model has lost what
this would need. They are written as float32.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)


BINARY_VERSION = 6
DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Read the named arrays of a CTranslate2 `model.bin`.

    Args:
        path (`Path`):
            The `model.bin` file.

    Returns:
        `dict[str, np.ndarray]`: every variable by its name, in its stored type.

    Raises:
        ValueError: the file is not a Whisper model in this format, or is cut short.
    """
    size = path.stat().st_size

    def take(file: BinaryIO, count: int) -> bytes:
        if count > size - file.tell():
            raise ValueError(f"{path} is cut short: {count} bytes wanted at byte {file.tell()} of {size}.")
        return file.read(count)

    def number(file: BinaryIO, form: str) -> int:
        return struct.unpack(form, take(file, struct.calcsize(form)))[0]

    def string(file: BinaryIO) -> str:
        return take(file, number(file, "<H"))[:-1].decode()

    variables = {}
    with path.open("rb") as file:
        version = number(file, "<I")
        if version != BINARY_VERSION:
            raise ValueError(f"{path} has binary version {version}; version {BINARY_VERSION} is read.")
        name = string(file)
        if name != "WhisperSpec":
            raise ValueError(f"{path} holds a {name}; a WhisperSpec is accepted.")
        number(file, "<I")
        for _ in range(number(file, "<I")):
            name = string(file)
            shape = [number(file, "<I") for _ in range(number(file, "<B"))]
            type_id, count = number(file, "<B"), number(file, "<I")
            if type_id not in DTYPES:
                raise ValueError(f"{path}: {name} has data type {type_id}; {sorted(DTYPES)} are read.")
            variables[name] = np.frombuffer(take(file, count), DTYPES[type_id]).reshape(shape)
    return variables


def to_state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Rename and split CTranslate2's arrays into the weights of `WhisperForConditionalGeneration`.

    Args:
        variables (`dict[str, np.ndarray]`):
            What [`read_variables`] returns.

    Returns:
        `dict[str, torch.Tensor]`: float32 weights by transformers' names.
    """
    weights = {}

    def put(name: str, source: str, kind: str = "weight") -> None:
        array = variables[source]
        if array.dtype.kind != "f":
            raise ValueError(f"{source} is stored as {array.dtype}; only float32 and float16 models are converted.")
        weights[f"model.{name}.{kind}"] = torch.from_numpy(array.astype(np.float32))

    def put_linear(name: str, source: str) -> None:
        put(name, f"{source}/weight")
        put(name, f"{source}/bias", "bias")

    def put_norm(name: str, source: str) -> None:
        put(name, f"{source}/gamma")
        put(name, f"{source}/beta", "bias")

    def put_fused(names: list[str], source: str) -> None:
        put_linear("fused", source)
        for kind in ("weight", "bias"):
            parts = weights.pop(f"model.fused.{kind}").chunk(len(names))
            for name, part in zip(names, parts, strict=True):
                # Whisper's key projections have no bias; CTranslate2 stores zeros there.
                if not (kind == "bias" and name.endswith("k_proj")):
                    weights[f"model.{name}.{kind}"] = part.contiguous()

    put_linear("encoder.conv1", "encoder/conv1")
    put_linear("encoder.conv2", "encoder/conv2")
    put("decoder.embed_tokens", "decoder/embeddings/weight")
    for stack in ("encoder", "decoder"):
        put(f"{stack}.embed_positions", f"{stack}/position_encodings/encodings")
        put_norm(f"{stack}.layer_norm", f"{stack}/layer_norm")
        for index in range(count_layers(variables, stack)):
            ours, theirs = f"{stack}.layers.{index}", f"{stack}/layer_{index}"
            attention = f"{ours}.self_attn"
            put_fused([f"{attention}.{part}_proj" for part in "qkv"], f"{theirs}/self_attention/linear_0")
            put_linear(f"{attention}.out_proj", f"{theirs}/self_attention/linear_1")
            put_norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if stack == "decoder":
                attention = f"{ours}.encoder_attn"
                put_linear(f"{attention}.q_proj", f"{theirs}/attention/linear_0")
                put_fused([f"{attention}.{part}_proj" for part in "kv"], f"{theirs}/attention/linear_1")
                put_linear(f"{attention}.out_proj", f"{theirs}/attention/linear_2")
                put_norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            put_linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put_linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            put_norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
    return weights


def count_layers(variables: dict[str, np.ndarray], stack: str) -> int:
    return sum(name.startswith(f"{stack}/layer_") and name.endswith("ffn/linear_0/weight") for name in variables)


def convert(source: Path, target: Path) -> None:
    """Write the transformers checkpoint (model, generation config, tokenizer, feature extractor).

    Args:
        source (`Path`):
            A folder with `model.bin`, `config.json` and `tokenizer.json`.
        target (`Path`):
            The folder to write, made if need be.

    Raises:
        ValueError: a file of the source is missing or not what it should be.
    """
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise ValueError(f"{source} has no {name}; a CTranslate2 Whisper folder with its tokenizer is accepted.")
    variables = read_variables(source / "model.bin")
    settings = json.loads((source / "config.json").read_text())
    tokenizer = WhisperTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token

    def token(text: str) -> int:
        return tokenizer.convert_tokens_to_ids(text)

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    # The three multilingual vocabularies have 51,865 or 51,866 entries, the English one 51,864.
    multilingual = vocabulary > 51864
    end, start = token("<|endoftext|>"), token("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=count_layers(variables, "encoder"),
        decoder_layers=count_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=variables["encoder/layer_0/ffn/linear_0/bias"].shape[0],
        decoder_ffn_dim=variables["decoder/layer_0/ffn/linear_0/bias"].shape[0],
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(to_state_dict(variables), strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise ValueError(f"{source}: weights missing {missing}, not expected {unexpected}.")
    model.tie_weights()

    generation = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
        "prev_sot_token_id": token("<|startofprev|>"),
        "no_timestamps_token_id": token("<|notimestamps|>"),
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "alignment_heads": settings["alignment_heads"],
        "max_length": config.max_target_positions,
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "is_multilingual": multilingual,
    }
    if multilingual:
        generation["lang_to_id"] = {tokenizer.convert_ids_to_tokens(i): i for i in settings["lang_ids"]}
        generation["task_to_id"] = {task: token(f"<|{task}|>") for task in ("transcribe", "translate")}
    model.generation_config = GenerationConfig(**generation)

    model.save_pretrained(target)
    feature_extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(feature_extractor=feature_extractor, tokenizer=tokenizer).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the CTranslate2 model")
    parser.add_argument("target", type=Path, help="folder to write")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
