#!/usr/bin/env bash
# Measure speed and memory of every method on one GPU, at full size: `make bench-gpu`. Random weights, no network.
#
#     recipes/benchmarks/gpu.sh [FOLDER]        # CSVs go there; default: benchmarks/results
#
# It needs a Python with torch for CUDA and transformers (PYTHON=…), and takes vlmzip from src. It runs bfloat16 and SDPA,
# and two presets with FlashAttention if that is installed. It stops after LIMIT seconds, keeps the finished results, and
# names the rest.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
folder=${1:-benchmarks/results}
limit=${LIMIT:-480}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU here"; print(torch.cuda.get_device_name())'
attentions=(sdpa)
if "$python" -c 'import flash_attn' 2>/dev/null; then attentions+=(flash_attention_2); fi

started=$SECONDS
failed=0
bench() {
    local left=$((limit - (SECONDS - started)))
    if ((left < 10)); then echo "left out, the time is up: $*" >&2; failed=1; return; fi
    echo "--- $*"
    timeout "$left" "$python" -m vlmzip.cli.main bench --device cuda --dtype bfloat16 --repeats 7 --out "$folder" "$@" \
        || { echo "not finished: $*" >&2; failed=1; }
}

for attention in "${attentions[@]}"; do
    for preset in llava-1.5-7b llava-next-7b; do bench --preset "$preset" --attention "$attention"; done
done
for preset in video-llava-7b llava-1.5-13b; do bench --preset "$preset"; done
bench --preset llava-1.5-7b --batch 8
bench --preset llava-next-13b
echo "$((SECONDS - started)) seconds"
exit "$failed"
