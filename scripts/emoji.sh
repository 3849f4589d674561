#!/usr/bin/env bash
# The whole chain on real pictures, by the commands that a user would type.
# usage: scripts/emoji.sh [MINUTES] [FOLDER]     minutes of training in all, 60 by default
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-60}
runs=${2:-runs/emoji}
source scripts/timed.sh

share() { awk -v m="$minutes" -v s="$1" 'BEGIN { printf "%.3f", m * s }'; }

run unclip data emoji --out "$runs/data" --sizes 64
data=$runs/data/64
run train-clip run="$runs/clip" data.path="$data" experiment=emoji_clip trainer.max_minutes="$(share 0.13)"
run unclip-embed run="$runs/embeddings" clip="$runs/clip" data="$data" precision=bf16 \
  "columns=[image_emb,text_emb,tokens,text_seq]"
run train-prior run="$runs/prior" data.path="$data" data.embeddings="$runs/embeddings" experiment=emoji_prior \
  trainer.max_minutes="$(share 0.10)"
run train-decoder run="$runs/decoder" data.path="$data" data.embeddings="$runs/embeddings" experiment=emoji_decoder \
  trainer.max_minutes="$(share 0.62)"
run train-upsampler run="$runs/upsampler" data.path="$data" experiment=emoji_upsampler trainer.max_minutes="$(share 0.07)"
run unclip compare --from "$runs" --data "$data/test_styles" --out "$runs/test_styles.png" --num 40
finish
