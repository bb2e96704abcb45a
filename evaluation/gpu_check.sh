#!/bin/sh
# Checks and measures SLED on one GPU in at most 8 minutes, and writes OUT/gpu_check.json:
#
#     evaluation/gpu_check.sh OUT
#
# Tests with the mark `gpu`; generation in bfloat16 at the released size with batches of 1 to 512, eager and compiled;
# streams on a server, eager and compiled; training steps. A part that fails or runs out of time is named in the table.
# `evaluation/gpu_check.sh OUT small` runs all of it on a small model, also on a CPU, to check this script.
set -u
out=$1
size=${2:-released}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
mkdir -p "$out"
device=$(python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")

run() {
    name=$1 seconds=$2
    shift 2
    timeout $((seconds * patience)) "$@" > "$out/$name.log" 2>&1
    echo "$name $?" | tee -a "$out/status.txt"
}

: > "$out/status.txt"
if [ "$size" = small ]; then
    model="" batches="1 2" compiled=1 streams="1 2" frames=4 lengths=1 training_batches=1 rounds=1
    patience=10
else
    model=--full-size batches="1 8 64 512" compiled="1 64" streams="1 8 32 128"
    frames=75 lengths=10 training_batches="8 32" rounds=2 patience=1
fi

run tests 100 python -m pytest -q -p no:cacheprovider -m gpu "$here/tests/test_gpu.py"

set --
for batch in $batches; do
    set -- "$@" --configuration "dtype=bfloat16,frames=$frames,batch=$batch"
done
for batch in $compiled; do
    set -- "$@" --configuration "dtype=bfloat16,frames=$frames,batch=$batch,compile=true"
done
# shellcheck disable=SC2086
run generation 170 python "$here/evaluation/run_benchmark.py" generation $model --rounds $rounds \
    --output-dir "$out/generation" "$@"

serving="$here/evaluation/benchmark_serving.py --device $device --dtype bfloat16 --num-blocks 3"
[ "$size" = small ] && serving="$serving --model $(python -c 'import transformers_sled; print(transformers_sled.builtin_voice())')"
# shellcheck disable=SC2086
run serving 60 python $serving --num-streams $streams --output "$out/serving.json"
# shellcheck disable=SC2086
run serving_compiled 90 python $serving --compile --num-streams $streams --output "$out/serving_compiled.json"

# shellcheck disable=SC2086
run training 60 python "$here/evaluation/run_benchmark.py" training $model --dtype bfloat16 --rounds $rounds \
    --seconds $lengths --batch $training_batches --output-dir "$out/training"

python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
lines = (line.split() for line in (out / "status.txt").read_text().splitlines())
table = {"exit_status": {name: int(status) for name, status in lines}}
files = {
    "generation": "generation/benchmark.json",
    "serving": "serving.json",
    "serving_compiled": "serving_compiled.json",
    "training": "training/benchmark.json",
}
table |= {name: json.loads((out / file).read_text()) for name, file in files.items() if (out / file).exists()}
(out / "gpu_check.json").write_text(json.dumps(table, indent=2) + "\n")
print(out / "gpu_check.json", table["exit_status"])
PYTHON
