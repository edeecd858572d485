#!/usr/bin/env bash
# The study of Qwen2.5-Coder-1.5B-Instruct, from the model's file to all runs; docs/study.md says what came out.
#
#   bash studies/qwen2.5-coder-1.5b/run.sh MODEL.gguf OUT [STAGE ...]
#
# MODEL.gguf: qwen2.5-coder-1.5b-instruct-q4_k_m.gguf of Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF, one GPU with 40 GB or
# more, and an environment with: pip install 'steerback[gguf,finetune,parquet]' vllm. A stage that is repeated continues
# where it stopped. OUT keeps everything; collect.py and figures.py read it.
#
# The stage `two_gpus` does everything on two GPUs, side by side, and writes what happened into OUT/log; with SHARE and TUNED below
# it took 27 minutes on two H200s, without the directions. SMALL=FILE.gguf adds a second, smaller model (the stage `small`).
#   SHARE="--set engine_options.options.gpu_memory_utilization=0.2 --set engine_options.options.kv_cache_memory_bytes=12000000000"
#   TUNED="--set n_latents=30 --set calibration.max_iterations=8 --set calibration.trials_per_iteration=10"
set -euo pipefail
usage="usage: run.sh MODEL.gguf OUT [STAGE ...]"
model=${1:?$usage} out=$(realpath -m "${2:?$usage}"); shift 2
[ ! -f "$model" ] || model=$(realpath "$model")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd); root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3} engine=${ENGINE:-vllm}
export STEERBACK_CACHE=${CACHE:-$out/cache} PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out/runs"
# Other sizes, to try the script without a GPU, e.g. TRAIN="--tokens 20000 --latents 512" SIZES="--preset quick"
read -ra train <<<"${TRAIN:-}"; read -ra sizes <<<"${SIZES:-}"; read -ra tuned <<<"${TUNED:-}"
read -ra share <<<"${SHARE:-}"  # memory of an engine that shares its GPU with others
steerback() { "$python" -m steerback "$@"; }
run() { steerback run "$@" --engine "$engine" --judge offline --runs "$out/runs"; }

sae() {  # an SAE of the model, its labels, and the target `coder`
  steerback sae train "$model" --name coder --engine "$engine" "${train[@]}"
}
timed() {
  "$python" "$root/benchmarks/campaign_gpu.py" coder --out "$out/campaign_gpu.json" --runs "$out/runs" --stages "$1"
}
campaign() {  # all experiments of the paper with two engines, timed
  timed "${CAMPAIGN:-warm:replicas=2,esr:replicas=2,paper:replicas=2}"
}
compare() {  # calibration against stock vLLM, and with one engine
  timed "${COMPARE:-stock,esr}"
}
paper() {  # the same without the benchmark; exit code 2: some experiments do not apply, for example without detectors
  steerback paper --target coder --engine "$engine" --judge offline --runs "$out/runs" "${sizes[@]}" || [ $? = 2 ]
}
best() {  # if the paper found no detectors: the latents that separate best in their place
  [ ! -f "$out/runs/paper-traces/summary.json" ] || return 0
  run detectors detector-ablation random-ablation detector-statistics traces episode-statistics \
    --from "$out/runs/paper-esr" --set detectors.rule=top || [ $? = 2 ]
}
second() {  # another seed of the SAE, on the same texts
  local own=$STEERBACK_CACHE/targets/coder-seed-1
  mkdir -p "$own"; [ -f "$own/corpus.jsonl" ] || cp "$STEERBACK_CACHE/targets/coder/corpus.jsonl" "$own/"
  steerback sae train "$model" --name coder-seed-1 --seed 1 "${train[@]}"
  run esr --target coder-seed-1 --name seed-1 "${sizes[@]}" "${share[@]}"
}
directions() {  # difference-of-means directions instead of latents, with the prompts and seeds of the paper's runs
  "$python" "$here/make_directions.py" coder "$STEERBACK_CACHE/targets/coder/corpus.jsonl" "$out/directions.txt"
  run esr --target coder --latents "$(cat "$out/directions.txt")" --name directions "${sizes[@]}"
}
data() {  # for experiment 4: self-corrections that the model itself wrote
  steerback finetune data --target "$model" --writer self --engine "$engine" --examples "${EXAMPLES:-400}" --data "$out/finetuning"
}
adapters() {  # nine adapters, three at the same time
  # texts of many lengths: without this, the memory of one length is not used for the next
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  for mixes in "50 10 20" "90 70 30" "80 60 40"; do
    # shellcheck disable=SC2086
    steerback finetune train $mixes --target "$model" --data "$out/finetuning" &
  done
  wait
  unset PYTORCH_CUDA_ALLOC_CONF
}
tuned() {  # the adapters, steered with the latents of a run of their base, each at its own thresholds
  run esr --target coder --name finetuning-base --preset quick --set trials_per_latent=10 "${tuned[@]}" "${share[@]}"
  run finetuning --from "$out/runs/finetuning-base" --set "options.adapters=$out/finetuning/adapters" --name finetuning
}
small() {  # the same SAE and ESR for a smaller model, on a share of the GPU
  steerback sae train "${SMALL:?SMALL is the GGUF file of the smaller model}" --name coder-small --batch-size 384 "${train[@]}"
  run esr --target coder-small --name small "${sizes[@]}" "${share[@]}"
}

lane() {  # lane NAME GPU STAGE...: stages on one GPU and a half of the cores; a stage that fails does not stop the next
  local name=$1 gpu=$2 cores; shift 2
  cores=$(($(nproc) > 1 ? $(nproc) / 2 : 1))
  export CUDA_VISIBLE_DEVICES=$gpu VLLM_CACHE_ROOT=$out/vllm-$name CACHE=$out/cache-$name
  mkdir -p "$CACHE"  # the stage `campaign` empties its cache of responses
  for folder in gguf targets; do ln -sfn "$out/cache/$folder" "$CACHE/$folder"; done
  for stage in "$@"; do
    local state=ended
    taskset -c "$((gpu * cores))-$((gpu * cores + cores - 1))" bash "$0" "$model" "$out" "$stage" \
      > "$out/log/$name-$stage.txt" 2>&1 || state=failed
    echo "$(date +%T) $name: $stage $state" >> "$out/log/progress.txt"
    touch "$out/log/$stage.ended"
  done
}
after() { while [ ! -f "$out/log/$1.ended" ]; do sleep 1; done; }
two_gpus() {
  mkdir -p "$out/log" "$out/cache/gguf" "$out/cache/targets"
  [[ $model != *.gguf ]] || "$python" -c "from steerback.targets.gguf import *; convert_gguf('$model')"
  lane first 0 sae campaign best compare directions &
  (lane second 1 data adapters; after sae; lane second 1 tuned) &
  (after data; [ -z "${SMALL:-}" ] || lane third 1 small; after sae; lane third 1 second) &
  wait
}

for stage in "${@:-sae campaign best second directions data adapters tuned}"; do
  for one in $stage; do
    began=$SECONDS
    echo "== $one"
    "$one"
    echo "== $one took $((SECONDS - began)) s"
  done
done
