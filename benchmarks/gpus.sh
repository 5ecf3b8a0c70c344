#!/usr/bin/env bash
# GPU tests, and the benches of training steps and of memory on one GPU: benchmarks/gpus.sh OUT STAGE...
#
#   tests       the GPU tests, those for several GPUs where there are several
#   step        a training step of 8,192 tokens, everybody's, beside the floor
#   step128k    and of 131,072
#   memory      what each way of saving memory saves and costs, by sequence length (1B)
#   memory128k  some of them at 131,072 tokens
#   lora        8B at 524,288 tokens on one card of 140 GB, adapters
#   full        the same, all weights in bf16, AdamW included
#
# Stages write to OUT/STAGE. `lora` and `full` see windows of 4,096 tokens: the memory of full attention, in far less
# time. They pin up to 100 GiB of the host's memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?say where the results go, then which stages} && shift

step() { python -m longspan bench step "$@"; }
memory() {  # segments that grow leave few gaps
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    python -m longspan bench memory --kv-heads 8 --words 128256 "$@"
}
one_billion=(--layers 16 --width 2048 --heads 32 --inner 8192)
eight_billion=(--layers 32 --width 4096 --heads 32 --inner 14336 --lengths 524288 --window 4096 --offload-gib 100
  --techniques "full, tiles, activations" --steps 1 --warm-up 1)

for stage in "$@"; do
  case $stage in
    tests) python -m pytest -q -m gpu tests/gpu --timeout 600 ;;
    step) step --lengths 8192 --contenders floor ours ours_pure transformers torchtitan_compiled --out "$out/step" ;;
    step128k) step --lengths 131072 --contenders floor ours --activation-budget 0.5 --steps 1 --out "$out/step128k" ;;
    memory) memory "${one_billion[@]}" --lengths 16384 65536 --steps 1 --out "$out/memory" ;;
    memory128k) memory "${one_billion[@]}" --lengths 131072 --steps 1 --out "$out/memory128k" --techniques \
      "recompute full" "recompute attention" "and mlp tiles" "and activations" ;;
    lora) memory "${eight_billion[@]}" --lora 16 --out "$out/lora" ;;
    full) memory "${eight_billion[@]}" --optimizer --out "$out/full" ;;
    *) echo "a stage is tests, step, step128k, memory, memory128k, lora or full, got $stage" >&2 && exit 2 ;;
  esac
done
