#!/usr/bin/env bash
# The main job: the whole chain on generated shapes, by the commands that a user would type.
# usage: scripts/demo.sh [MINUTES] [FOLDER]     MINUTES of wall-clock time in all, 15 by default
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-15}
runs=${2:-runs/demo}
source scripts/timed.sh

embedded=(data.path="$runs/data" data.embeddings="$runs/embeddings")

train_prior_and_upsampler() {
  run train-prior run="$runs/prior" "${embedded[@]}" experiment=demo_prior trainer.max_minutes="$(share 0.32)"
  run train-upsampler run="$runs/upsampler" data.path="$runs/data" experiment=demo_upsampler trainer.max_minutes="$(share 0.25)"
}

# the split that is written last
[[ -e $runs/data/verdict/index.json ]] || run unclip data shapes --out "$runs/data" --num 20000 --size 64 --seed 0
run train-clip run="$runs/clip" data.path="$runs/data" experiment=demo_clip trainer.max_minutes="$(share 0.195)"
run unclip-embed run="$runs/embeddings" clip="$runs/clip" data="$runs/data" precision=bf16 \
  "columns=[image_emb,text_emb,tokens,text_seq]"
run_beside train_prior_and_upsampler \
  train-decoder run="$runs/decoder" "${embedded[@]}" experiment=demo_decoder trainer.max_minutes="$(share 0.625)"
run unclip generate --from "$runs" --out "$runs/pictures" --num 4 --seed 0 "a red cube on top of a blue cube" \
  "a small green sphere left of a yellow cone" "a purple ring" "an orange cylinder under a cyan sphere"
run unclip verdict --from "$runs" --data "$runs/data" --out "$runs/verdict"
finish
