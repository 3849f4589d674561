#!/usr/bin/env bash
# The whole chain on real pictures, by the commands that a user would type.
# usage: scripts/emoji.sh [MINUTES] [FOLDER]     minutes of training in all, 72 by default
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-72}
runs=${2:-runs/emoji}
source scripts/timed.sh

data=$runs/data/64
embedded=(data.path="$data" data.embeddings="$runs/embeddings")
train_judge() { # another CLIP, which looks at the drawn pictures
  run train-clip run="$runs/judge" seed=1 data.path="$data" experiment=emoji_clip trainer.max_minutes="$(share 0.12)"
}
train_upsampler() {
  run train-upsampler run="$runs/upsampler" data.path="$data" experiment=emoji_upsampler trainer.max_minutes="$(share 0.07)"
}

run unclip data emoji --out "$runs/data" --sizes 64
run_beside train_judge \
  train-clip run="$runs/clip" data.path="$data" experiment=emoji_clip trainer.max_minutes="$(share 0.12)"
run unclip-embed run="$runs/embeddings" clip="$runs/clip" data="$data" precision=bf16
run_beside train_upsampler \
  train-prior run="$runs/prior" "${embedded[@]}" experiment=emoji_prior trainer.max_minutes="$(share 0.07)"
train_decoder() { run_on_all_cores train-decoder "${embedded[@]}" "$@"; }
# two nets: one for the noisier steps of a drawing, then one for the others, which takes the first over
train_decoder run="$runs/first_decoder" experiment=emoji_decoder_first trainer.max_minutes="$(share 0.48)"
train_decoder run="$runs/decoder" experiment=emoji_decoder_last model.first="$runs/first_decoder" trainer.max_minutes="$(share 0.33)"
run unclip compare --from "$runs" --data "$data/test_styles" --out "$runs/test_styles.png" --num 40
run unclip measure --from "$runs" --data "$data" --judge "$runs/judge"
finish
