"""
Trains a model with known alignments of text and speech, for corpora too small to find them by themselves.

    python examples/tiny_voice/train_aligned.py --alignments alignments.parquet --dataset_name codes --config_name ... \
        --tokenizer_name tokenizer --codec_name codec/export --output_dir sled --do_train

Takes all arguments of train_sled.py, and those of the alignments. What they do is told in
`transformers_sled/training/aligned_trainer.py`.
"""

import logging

from transformers import set_seed

from transformers_sled.training import (
    AlignedTrainer,
    AlignmentArguments,
    SledDataArguments,
    SledModelArguments,
    SledTrainingArguments,
    add_adapters,
    load_model,
    load_splits,
    parse_recipe,
    run_command,
)


def main() -> None:
    alignment_args, model_args, data_args, args = parse_recipe(
        [AlignmentArguments, SledModelArguments, SledDataArguments, SledTrainingArguments]
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        level=logging.INFO if args.should_log else logging.ERROR,
    )
    set_seed(args.seed)
    model, processor = load_model(model_args)
    train_dataset, eval_dataset = load_splits(data_args, args, model, processor)
    trainer = AlignedTrainer(
        model=add_adapters(model, model_args),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        alignment_args=alignment_args,
    )
    trainer.run(dataset=data_args.dataset_name, finetuned_from=model_args.model_name_or_path)


if __name__ == "__main__":
    run_command(main)
