#!/usr/bin/env bash
# The paper's comparison with GLIDE on a chain of shapes: train the same decoder without z_i on the same data for the same
# time, then draw what unCLIP is known to bind badly with both.
#
# usage: scripts/binding.sh [options] [RUNS]    RUNS: a chain that scripts/demo.sh trained (runs/demo)
#   --minutes M      of training (those of RUNS/decoder, on half of the cores, as it had beside the prior)
#   --num N          scenes of the probe (64)
#   --set "K=V ..."  further settings of train-decoder
#
# RUNS/text_decoder is the decoder, RUNS/probes what was found. The same command again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/probing.sh

minutes='' num=64 settings=()
while [[ ${1:-} == --* ]]; do
  [[ $# -ge 2 ]] || fail "$1 needs a value"
  case $1 in
    --minutes) minutes=$2 ;;
    --num) num=$2 ;;
    --set) read -ra settings <<<"$2" ;;
    *) fail "unknown option $1; the head of $0 lists them" ;;
  esac
  shift 2
done
runs=${1:-runs/demo}
for part in clip prior decoder data embeddings; do
  [[ -e $runs/$part ]] || fail "$runs has no $part: train a chain with scripts/demo.sh first"
done
if [[ -z $minutes ]]; then
  minutes=$(sed -n 's/^  max_minutes: \([0-9.]*\)$/\1/p' "$runs/decoder/config.yaml")
  [[ -n $minutes ]] || fail "$runs/decoder was not trained by the clock: say --minutes"
fi

threads=${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
OMP_NUM_THREADS=$(((threads + 1) / 2)) run train-decoder run="$runs/text_decoder" data.path="$runs/data" \
  data.embeddings="$runs/embeddings" experiment=demo_decoder model.conditioning.image=false trainer.max_minutes="$minutes" \
  "${settings[@]}"
run unclip binding-probe --from "$runs" --text-decoder "$runs/text_decoder" --out "$runs/probes" --num "$num"
for name in decoder text_decoder; do
  printf '\n%s: %s steps\n' "$name" "$(steps_of "$runs/$name")"
done
