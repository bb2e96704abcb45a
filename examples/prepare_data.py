"""
Prepare training data: audio and text to EnCodec codes, once.

    python examples/prepare_data.py --dataset my_corpus/ --output_dir my_codes/
    python examples/prepare_data.py --manifest libriheavy_cuts_small.jsonl.gz --audio_root data/ --output_dir my_codes/

Run it again after an interruption and it goes on where it stopped. Share the work over processes, GPUs or machines with
`torchrun --nproc_per_node 8 examples/prepare_data.py ...`.
"""

import json
import logging
import math
import os
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, EncodecModel, HfArgumentParser

from transformers_sled.data_sled import load_manifest, load_source, prepare_dataset


@dataclass
class PrepareArguments:
    output_dir: str = field(metadata={"help": "Folder to write the dataset to. Several splits may share one."})
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
    split: str = field(default="train", metadata={"help": "Name of the split to write."})
    audio_root: str = field(default="", metadata={"help": "Folder that relative audio paths start from."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    audio_column: str = field(default="audio", metadata={"help": "Column with the audio: files, paths or bytes."})
    speaker_column: str = field(default="speaker", metadata={"help": "Column with the speaker; may be absent."})
    id_column: str = field(default="id", metadata={"help": "Column that names an utterance; may be absent."})
    codec: str = field(default="facebook/encodec_24khz", metadata={"help": "EnCodec to extract codes with."})
    bandwidth: float = field(default=6.0, metadata={"help": "EnCodec bandwidth in kilobits a second."})
    tokenizer: str | None = field(default=None, metadata={"help": "Counts text tokens towards --max_positions."})
    min_duration: float = field(default=0.5, metadata={"help": "Shortest utterance to keep, in seconds."})
    max_duration: float = field(default=math.inf, metadata={"help": "Longest utterance to keep, in seconds."})
    max_positions: int = field(default=2048, metadata={"help": "Tokens and frames an utterance may have together."})
    shard_size: int = field(default=256, metadata={"help": "Source rows a file; a kill loses at most open files."})
    batch_seconds: float = field(default=30.0, metadata={"help": "Audio in a codec batch; a GPU takes hundreds."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read and resample ahead of the codec."})


def main() -> None:
    (args,) = HfArgumentParser(PrepareArguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO)
    if bool(args.manifest) == (args.dataset is not None):
        raise ValueError("Give either --manifest or --dataset")
    dataset = (
        load_manifest(args.manifest)
        if args.manifest
        else load_source(args.dataset, name=args.dataset_config, split=args.dataset_split)
    )
    # torchrun sets these for every process it starts
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    report = prepare_dataset(
        dataset,
        args.output_dir,
        EncodecModel.from_pretrained(args.codec).eval().to(device),
        split=args.split,
        audio_root=args.audio_root,
        text_column=args.text_column,
        audio_column=args.audio_column,
        speaker_column=args.speaker_column,
        id_column=args.id_column,
        tokenizer=AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None,
        bandwidth=args.bandwidth,
        min_duration=args.min_duration,
        max_duration=args.max_duration,
        max_positions=args.max_positions,
        shard_size=args.shard_size,
        batch_seconds=args.batch_seconds,
        num_workers=args.num_workers,
        rank=rank,
        world_size=world_size,
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
