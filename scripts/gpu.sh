#!/usr/bin/env bash
# Everything that needs a GPU: facts, tests, benchmarks, experiments; stage by stage, each within a limit.
#
#   scripts/gpu.sh [--out DIR] [--data DIR] [--limit SECONDS] [--toy] [STAGE ...]
#
# A stage that is stopped by its limit goes on where it was when it is started again with the same --out. What it leaves
# in --out is small: text, jsonl and compressed jsonl. --toy rehearses all stages on the CPU at sizes that mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

out=gpu-results data= limit=570 toy= stages=()
while (($#)); do
  case $1 in
    --out) out=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --limit) limit=$2; shift 2 ;;
    --toy) toy=1; shift ;;
    -*) echo "gpu.sh: expected --out, --data, --limit, --toy or a stage, got $1" >&2; exit 2 ;;
    *) stages+=("$1"); shift ;;
  esac
done
((${#stages[@]})) || stages=(facts tests benchmarks experiments small_batches)
device=cuda
[[ $toy ]] && device=cpu
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

facts() { "$python" scripts/gpu_facts.py --device "$device" ${toy:+--toy} >"$out/facts.json"; }

tests() {
  # The suite's own GPU tests first; then those of the core, which run on the CPU of this machine with its torch.
  "$python" -m pytest -q -p no:cacheprovider tests/test_device.py --device "$device" || return
  # The kernels on the device itself; without one they run in the interpreter, which the suite does anyway.
  [[ $toy ]] || "$python" -m pytest -q -p no:cacheprovider tests/test_triton.py || return
  [[ $toy ]] || "$python" -m pytest -q -p no:cacheprovider -n 8 --dist worksteal tests -k "not paper and not faults"
}

benchmarks() {
  if [[ $toy ]]; then
    "$python" -m benchmarks run --device cpu --suite quick --only 2x8x4x4 --seconds 0.05 --resume --results "$out"
  else
    "$python" -m benchmarks run --device cuda --suite gpu --seconds 0.4 --resume --results "$out"
  fi
}

reproduce() {
  local preset=$1 options=(--data "$data" --device "$device" --workers 4)
  [[ $toy ]] && preset=smoke options=(--steps 8 --evaluations 2 --seeds 1 --workers 0)
  "$python" -m batchrenorm.paper.cli reproduce "$preset" --runs "$out/runs" "${options[@]}"
  local status=$?
  [[ -f $out/runs/$preset/results.jsonl ]] && xz -kf "$out/runs/$preset/results.jsonl"
  return $status
}

experiments() { reproduce tiny-imagenet; }

small_batches() { reproduce small-batch-resnet && reproduce small-batch-inception; }

export -f facts tests benchmarks reproduce experiments small_batches
export out data toy device python
failed=0
for stage in "${stages[@]}"; do
  declare -F "$stage" >/dev/null || { echo "gpu.sh: expected a stage, facts, tests, benchmarks, experiments or small_batches, got $stage" >&2; exit 2; }
  echo "== $stage, at most $limit s"
  began=$SECONDS
  # TERM first: the experiments write their checkpoints then.
  timeout --signal=TERM --kill-after=20 "$limit" bash -c "$stage" 2>&1 | tee -a "$out/$stage.log"
  status=${PIPESTATUS[0]}
  echo "== $stage: exit $status after $((SECONDS - began)) s" | tee -a "$out/stages.log"
  ((status)) && failed=1
done
exit $failed
