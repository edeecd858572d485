#!/usr/bin/env bash
# The study of Qwen2.5-Coder-1.5B-Instruct, from the model's file to all runs; docs/study.md says what came out.
#
#   bash studies/qwen2.5-coder-1.5b/run.sh MODEL.gguf OUT [STAGE ...]
#
# MODEL.gguf: qwen2.5-coder-1.5b-instruct-q4_k_m.gguf of Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF, one GPU with 40 GB or
# more, and an environment with: pip install 'steerback[gguf,finetune,parquet]' vllm. The stages sae, second
# and directions took 5 minutes each on one H200. A stage that is repeated continues where it stopped. OUT keeps everything.
set -euo pipefail
usage="usage: run.sh MODEL.gguf OUT [STAGE ...]"
model=${1:?$usage} out=$(realpath -m "${2:?$usage}"); shift 2
[ ! -f "$model" ] || model=$(realpath "$model")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3} engine=${ENGINE:-vllm}
export STEERBACK_CACHE=$out/cache PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out/runs"
# Other sizes, to try the script without a GPU, e.g. TRAIN="--tokens 20000 --latents 512" SIZES="--preset quick"
read -ra train <<<"${TRAIN:-}"; read -ra sizes <<<"${SIZES:-}"; read -ra tuned <<<"${TUNED:-}"
steerback() { "$python" -m steerback "$@"; }
run() { steerback run "$@" --engine "$engine" --judge offline --runs "$out/runs"; }

sae() {  # an SAE of the model, its labels, and the target `coder`
  steerback sae train "$model" --name coder --engine "$engine" "${train[@]}"
}
campaign() {  # all experiments of the paper, timed, and calibration against stock vLLM
  "$python" "$root/benchmarks/campaign_gpu.py" coder --out "$out/campaign_gpu.json" --runs "$out/runs"
}
paper() {  # the same without the benchmark; exit code 2: some experiments do not apply, for example without detectors
  steerback paper --target coder --engine "$engine" --judge offline --runs "$out/runs" "${sizes[@]}" || [ $? = 2 ]
}
second() {  # another seed of the SAE, on the same texts
  local own=$STEERBACK_CACHE/targets/coder-seed-1
  mkdir -p "$own"; [ -f "$own/corpus.jsonl" ] || cp "$STEERBACK_CACHE/targets/coder/corpus.jsonl" "$own/"
  steerback sae train "$model" --name coder-seed-1 --seed 1 "${train[@]}"
  run esr --target coder-seed-1 --name seed-1 "${sizes[@]}"
}
directions() {  # difference-of-means directions instead of latents, with the prompts and seeds of the paper's runs
  "$python" "$here/make_directions.py" coder "$STEERBACK_CACHE/targets/coder/corpus.jsonl" "$out/directions.txt"
  run esr --target coder --latents "$(cat "$out/directions.txt")" --name directions "${sizes[@]}"
}
finetune() {  # experiment 4: nine adapters on self-corrections that the model itself wrote
  steerback finetune data --target "$model" --writer self --engine "$engine" --examples "${EXAMPLES:-400}" --data "$out/finetuning"
  # texts of many lengths: without this, the memory of one length is not used for the next
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True steerback finetune train --target "$model" --data "$out/finetuning"
}
tuned() {  # the adapters, steered with the latents of a run of their base, each at its own thresholds
  run esr --target coder --name finetuning-base --preset quick --set trials_per_latent=10 "${tuned[@]}"
  run finetuning --from "$out/runs/finetuning-base" --set "options.adapters=$out/finetuning/adapters" --name finetuning
}

for stage in "${@:-sae campaign second directions finetune tuned}"; do
  for one in $stage; do
    began=$SECONDS
    echo "== $one"
    "$one"
    echo "== $one took $((SECONDS - began)) s"
  done
done
