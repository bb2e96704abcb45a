"""
Speaks the answer of a language model while it is being written.

    python examples/stream_from_llm.py "Why is the sky blue?" --llm HuggingFaceTB/SmolLM2-360M-Instruct --output answer.wav

Takes the same options as `stream_speech.py`. The answer is shown on standard error.
"""

import argparse
import sys
import threading
from collections.abc import Iterator

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from stream_speech import add_speech_arguments, load, speak
from transformers_sled.training import run_command


class StopWhen(StoppingCriteria):
    """Stops the language model once nobody listens any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def write_answer(llm_name: str, question: str, max_new_tokens: int, device: str) -> Iterator[str]:
    """Yields the answer piece by piece. The language model runs in a thread of its own, ahead of the speech."""
    tokenizer = AutoTokenizer.from_pretrained(llm_name)
    llm = AutoModelForCausalLM.from_pretrained(llm_name).to(device)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(question, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    has_left = threading.Event()

    def run() -> None:
        try:
            criteria = StoppingCriteriaList([StopWhen(has_left)])
            llm.generate(
                **inputs.to(device), streamer=streamer, max_new_tokens=max_new_tokens, stopping_criteria=criteria
            )
        finally:
            # Also after an error, or the speech would wait for ever.
            streamer.end()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for piece in streamer:
            print(piece, end="", flush=True, file=sys.stderr)
            yield piece
        print(file=sys.stderr)
    finally:
        has_left.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--llm", required=True, help="Causal language model on the Hub or in a folder")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="Longest answer in tokens")
    add_speech_arguments(parser)
    args = parser.parse_args()
    model, processor = load(args)
    sys.exit(speak(args, model, processor, write_answer(args.llm, args.question, args.max_new_tokens, args.device)))


if __name__ == "__main__":
    run_command(main)
