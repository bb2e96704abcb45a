"""
Measures what it costs to import the package and to load a model of the released size.

    python evaluation/measure_loading.py

It writes checkpoints of the released architecture with random weights, in the released layout and in float32 and
bfloat16, and measures in fresh processes: the peak of resident memory while one loads in bfloat16, above the memory after
the imports and in relation to the size of the loaded weights; the seconds that loading takes; the seconds for a sentence
through `pipeline`; the seconds that `import transformers_sled` takes after everything that it imports from transformers.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


TOKENIZER = Path(__file__).parents[1] / "tests" / "fixtures" / "golden" / "offline"
NUM_IMPORTS = 5


def write_checkpoints(folder: Path) -> None:
    """Writes `float32`, `bfloat16` and their `codec` into a folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import EncodecModel

    from transformers_sled import SledConfig, SledForSpeechSynthesis

    config = SledConfig()
    released_config = {key: value for key, value in config.to_dict().items() if not key.startswith("codec_")}
    for released_name, name in SledConfig.attribute_map.items():
        released_config[released_name] = released_config.pop(name)
    released_config["model_type"] = "speech_llama"
    model = SledForSpeechSynthesis(config)
    EncodecModel(config.codec_config).save_pretrained(folder / "codec")
    weights = {
        name.replace("generative_head.", "scoreloss.net."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("codec.")
    }
    for dtype in ("float32", "bfloat16"):
        shutil.copytree(TOKENIZER, folder / dtype, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        cast["bceloss.pos_weight"] = torch.tensor([100.0])
        save_file(cast, folder / dtype / "model.safetensors", metadata={"format": "pt"})
        (folder / dtype / "config.json").write_text(json.dumps(released_config | {"dtype": dtype}))


def get_resident_bytes(field: str) -> int:
    """`VmRSS`, the resident memory now, or `VmHWM`, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"The system does not tell `{field}`.")


def measure_loading(checkpoint: str, codec: str) -> dict[str, float]:
    import torch

    from transformers_sled import SledForSpeechSynthesis

    after_imports = get_resident_bytes("VmRSS")
    start = time.perf_counter()
    model = SledForSpeechSynthesis.from_pretrained(checkpoint, codec=codec, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    peak = get_resident_bytes("VmHWM") - after_imports
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return {
        "parameters": model.num_parameters(),
        "weights_mb": round(weights / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "ratio": round(peak / weights, 2),
        "seconds": round(seconds, 2),
    }


def measure_speaking(checkpoint: str, codec: str) -> dict[str, float]:
    import torch
    from transformers import pipeline

    import transformers_sled

    speaker = pipeline("text-to-speech", model=checkpoint, dtype=torch.bfloat16, model_kwargs={"codec": codec})
    if not isinstance(speaker.processor, transformers_sled.SledProcessor):
        raise RuntimeError(f"The pipeline has loaded {type(speaker.processor).__name__}.")
    torch.manual_seed(0)
    start = time.perf_counter()
    # Random weights do not know when to end.
    speech = speaker("The dog barked all night.", generate_kwargs={"min_new_tokens": 75, "max_new_tokens": 75})
    seconds = time.perf_counter() - start
    return {
        "seconds_of_audio": round(speech["audio"].size / speech["sampling_rate"], 2),
        "seconds": round(seconds, 2),
    }


def measure_import() -> float:
    """Seconds that the package takes once everything that it imports from transformers is there."""
    package = Path(importlib.util.find_spec("transformers_sled").origin).parent
    waiting, read = ["__init__"], set()
    while waiting:
        name = waiting.pop()
        read.add(name)
        for node in ast.parse((package / f"{name}.py").read_text()).body:
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level == 1 and node.module not in read:
                waiting.append(node.module)
            elif node.level == 0 and node.module.split(".")[0] == "transformers":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
    start = time.perf_counter()
    import transformers_sled  # noqa: F401

    return time.perf_counter() - start


def run(*arguments: str | Path) -> str:
    """What this script prints with the arguments, in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="task")
    subparsers.add_parser("write", help="write the checkpoints").add_argument("folder", type=Path)
    for name in ("loading", "speaking"):
        subparser = subparsers.add_parser(name, help="measure one checkpoint in this process")
        subparser.add_argument("checkpoint")
        subparser.add_argument("codec")
    subparsers.add_parser("import", help="measure the import in this process")
    arguments = parser.parse_args()

    if arguments.task == "write":
        write_checkpoints(arguments.folder)
    elif arguments.task == "loading":
        print(json.dumps(measure_loading(arguments.checkpoint, arguments.codec)))
    elif arguments.task == "speaking":
        print(json.dumps(measure_speaking(arguments.checkpoint, arguments.codec)))
    elif arguments.task == "import":
        print(measure_import())
    else:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "write", folder], check=True)
            for dtype in ("float32", "bfloat16"):
                print(f"loading {dtype} as bfloat16:", run("loading", Path(folder, dtype), Path(folder, "codec")))
            print("speaking:", run("speaking", Path(folder, "bfloat16"), Path(folder, "codec")))
        seconds = [float(run("import")) for _ in range(NUM_IMPORTS)]
        print(f"import transformers_sled: {statistics.median(seconds):.2f} s (median of {NUM_IMPORTS})")


if __name__ == "__main__":
    main()
