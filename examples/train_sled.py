"""
Train SLED with the Trainer: from scratch, from a checkpoint, from an offline to an interleaved model, or with LoRA.

    python examples/train_sled.py examples/configs/offline.yaml --dataset_name my_codes/ --tokenizer_name my_tokenizer/ \
        --output_dir my_sled/

Every value of the YAML (or JSON) file is an argument and can be given, or given again, on the command line. Run the same
command again after an interruption and it goes on from the last checkpoint. `torchrun` and `accelerate launch` run it
on many GPUs.
"""

import logging

from transformers import set_seed

from transformers_sled.training import (
    SledDataArguments,
    SledDataCollator,
    SledModelArguments,
    SledTrainer,
    SledTrainingArguments,
    add_adapters,
    load_model,
    load_splits,
    parse_recipe,
    run_command,
)


def main() -> None:
    model_args, data_args, args = parse_recipe([SledModelArguments, SledDataArguments, SledTrainingArguments])
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        level=logging.INFO if args.should_log else logging.ERROR,
    )
    set_seed(args.seed)
    model, processor = load_model(model_args)
    train_dataset, eval_dataset = load_splits(data_args, args, model, processor)
    trainer = SledTrainer(
        model=add_adapters(model, model_args),
        args=args,
        data_collator=SledDataCollator(processor),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    trainer.run(dataset=data_args.dataset_name, finetuned_from=model_args.model_name_or_path)


if __name__ == "__main__":
    run_command(main)
