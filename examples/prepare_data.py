"""
Prepare training data: audio and text to EnCodec codes, once.

    python examples/prepare_data.py --dataset my_corpus/ --output_dir my_codes/
    python examples/prepare_data.py --manifest libriheavy_cuts_small.jsonl.gz --audio_root data/ --output_dir my_codes/

Run it again after an interruption and it goes on where it stopped. Share the work over processes, GPUs or machines with
`torchrun --nproc_per_node 8 examples/prepare_data.py ...`.
"""

import json
import logging
import os
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, EncodecModel, HfArgumentParser

from transformers_sled.training import PreparationArguments, load_manifest, load_source, prepare_dataset, run_command


@dataclass
class SourceArguments:
    manifest: list[str] = field(
        default_factory=list, metadata={"help": "LibriHeavy manifests: JSON lines of lhotse cuts, gzipped or not."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Instead of manifests: a parquet, csv or JSON lines file, a folder of audio files with a "
            "metadata.csv or metadata.jsonl, a folder from save_to_disk, or a dataset on the Hub."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset that has several."})
    dataset_split: str = field(default="train", metadata={"help": "Split to read, such as train or train[:95%]."})
    codec: str = field(default="facebook/encodec_24khz", metadata={"help": "EnCodec to extract codes with."})
    tokenizer: str | None = field(default=None, metadata={"help": "Counts text tokens towards --max_positions."})


def main() -> None:
    source, arguments = HfArgumentParser((SourceArguments, PreparationArguments)).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO)
    if bool(source.manifest) == (source.dataset is not None):
        raise ValueError("Give either --manifest or --dataset")
    dataset = (
        load_manifest(source.manifest)
        if source.manifest
        else load_source(source.dataset, source.dataset_config, source.dataset_split)
    )
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    report = prepare_dataset(
        dataset,
        EncodecModel.from_pretrained(source.codec).eval().to(device),
        arguments,
        tokenizer=AutoTokenizer.from_pretrained(source.tokenizer) if source.tokenizer else None,
        # torchrun sets these for every process it starts.
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_command(main)
