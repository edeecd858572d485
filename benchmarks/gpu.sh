#!/usr/bin/env bash
# Everything that needs a GPU, the most important first; each stage writes JSON into OUT as it goes.
#   bash benchmarks/gpu.sh OUT [STAGE ...]          all stages take about 25 minutes on one H200
# Needs an environment with vLLM; vllm-lens for the stage `peers`, peft and trl for `finetune`.
set -uo pipefail
out=$(realpath -m "${1:?usage: gpu.sh OUT [STAGE ...]}"); shift
mkdir -p "$out"; cd "$(dirname "$0")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_LENS_DISABLE=1   # makes every engine eager unless it is told not to
cache=$(mktemp -d)

tests() {  # numbers, by both model runners, at the same time: small models on one GPU
  VLLM_CACHE_ROOT=$cache/v2 VLLM_USE_V2_MODEL_RUNNER=1 python3 -m pytest tests/vllm_engine > "$out/tests_v2.log" 2>&1 &
  VLLM_CACHE_ROOT=$cache/v1 VLLM_USE_V2_MODEL_RUNNER=0 python3 -m pytest tests/vllm_engine > "$out/tests_v1.log" 2>&1
  wait; tail -n 25 "$out"/tests_v?.log
}
speed() { python3 benchmarks/vllm_gpu.py llama-8b --requests 256 512 --stream 1024 --pool --out "$out/vllm_8b.json"; }
layer() { python3 benchmarks/vllm_layer.py --out "$out/vllm_layer.json"; }
peers() {
  VLLM_LENS_DISABLE='' python3 benchmarks/vllm_peers.py lens llama-8b --batches 256x16 256x64shared 32x256 --warm-up 4 \
    --out "$out/vllm_lens.json"
  python3 benchmarks/vllm_peers.py transformers llama-8b --batches 256x256 --out "$out/vllm_transformers.json"
}
gemma() { python3 benchmarks/vllm_gpu.py gemma-9b --kinds add+clamp+record --latents 16384 --out "$out/vllm_gemma.json"; }
engine() { python3 benchmarks/engine_speed.py --target random:8b --tokens 64 --device cuda --out "$out/engine_speed.json"; }
big() {
  python3 benchmarks/vllm_gpu.py llama-70b-fp8 --kinds add+clamp+record --latents 16384 --apart --kv-gib 0 \
    --out "$out/vllm_70b.json"
}
finetune() { python3 benchmarks/finetune_gpu.py --out "$out/finetune_gpu.json"; }
parallel() {  # on two GPUs, or two workers on one
  for runner in 1 0; do
    STEERBACK_TEST_PARALLEL=1 VLLM_CACHE_ROOT=$cache/p$runner VLLM_USE_V2_MODEL_RUNNER=$runner python3 -m pytest \
      tests/vllm_engine/test_engine_parallel.py > "$out/tests_parallel_v$((runner + 1)).log" 2>&1
  done
  tail -n 25 "$out"/tests_parallel_v?.log
}

for stage in "${@:-tests speed gemma engine big peers finetune layer}"; do
  for one in $stage; do echo "== $one, $SECONDS s"; "$one" || echo "$one: exit status $?"; done
done
rm -rf "$cache"
