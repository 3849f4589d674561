#!/usr/bin/env bash
# The main job: the whole chain on generated shapes, by the commands that a user would type.
# usage: scripts/demo.sh [MINUTES] [FOLDER]     MINUTES of wall-clock time in all, 15 by default
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-15}
runs=${2:-runs/demo}
source scripts/timed.sh

share() { awk -v m="$minutes" -v s="$1" 'BEGIN { printf "%.3f", m * s }'; }

run unclip data shapes --out "$runs/data" --num 20000 --size 64 --seed 0
run train-clip run="$runs/clip" data.path="$runs/data" experiment=demo_clip trainer.max_minutes="$(share 0.12)"
run unclip-embed run="$runs/embeddings" clip="$runs/clip" data="$runs/data" precision=bf16 \
  "columns=[image_emb,text_emb,tokens,text_seq]"
run train-prior run="$runs/prior" data.path="$runs/data" data.embeddings="$runs/embeddings" experiment=demo_prior \
  trainer.max_minutes="$(share 0.07)"
run train-decoder run="$runs/decoder" data.path="$runs/data" data.embeddings="$runs/embeddings" experiment=demo_decoder \
  trainer.max_minutes="$(share 0.46)"
run train-upsampler run="$runs/upsampler" data.path="$runs/data" experiment=demo_upsampler trainer.max_minutes="$(share 0.09)"
run unclip generate --from "$runs" --out "$runs/pictures" --num 4 --seed 0 "a red cube on top of a blue cube" \
  "a small green sphere left of a yellow cone" "a purple ring" "an orange cylinder under a cyan sphere"
run unclip verdict --from "$runs" --data "$runs/data" --out "$runs/verdict"
finish
