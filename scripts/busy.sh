#!/usr/bin/env bash
# Do scenes of many objects need a larger base? A base of 32 px against one of 64, both enlarged to 128: the paper's 64 against
# 128 at a scale that two cores can train. Same CLIP, prior, nets, batch and data; only the base's pixels differ.
#
# usage: scripts/busy.sh [options]
#   --out FOLDER     where data and runs go (runs/busy); the same command again goes on where it stopped
#   --minutes M      of training for each base (60); CLIP, prior and each upsampler get half of it, the base of 64 px that sees
#                    as many samples as the one of 32 up to four times as much
#   --num N          training pictures of 1 to 8 objects (20000)
#   --probe N        captions of the probe (128)
#   --set "K=V ..."  further settings of every training
#
# FOLDER/base32 and FOLDER/base64 had equal wall-clock time, FOLDER/base64-samples saw as many samples as base32. Each is a
# chain for unclip generate --from.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/probing.sh

out=runs/busy minutes=60 num=20000 probe=128 settings=()
read_options "$@"

chain() { # FOLDER BASE SETTING...: the decoder, and the links that make the folder a chain
  mkdir -p "$out/$1"
  for stage in clip prior; do ln -sfn "../$stage" "$out/$1/$stage"; done
  ln -sfn "../upsampler$2" "$out/$1/upsampler"
  run train-decoder run="$out/$1/decoder" "${embedded[@]}" experiment="busy$2_decoder" "${settings[@]}" "${@:3}"
  run unclip busy-probe --from "$out/$1" --out "$out/$1/probes" --num "$probe"
}

[[ -e $out/data/verdict/index.json ]] || run unclip data shapes --out "$out/data" --num "$num" --size 128 --objects 1-8
run train-clip run="$out/clip" "${data[@]}" experiment=busy_clip trainer.max_minutes="$half" "${settings[@]}"
run unclip-embed run="$out/embeddings" clip="$out/clip" data="$out/data" precision=bf16 \
  "columns=[image_emb,text_emb,tokens,text_seq]"
run train-prior run="$out/prior" "${embedded[@]}" experiment=demo_prior data.image_size=64 trainer.max_minutes="$half" \
  "${settings[@]}"
for base in 32 64; do
  run train-upsampler run="$out/upsampler$base" "${data[@]}" experiment="busy${base}_upsampler" \
    trainer.max_minutes="$half" "${settings[@]}"
done
chain base32 32 trainer.max_minutes="$minutes"
chain base64 64 trainer.max_minutes="$minutes"
chain base64-samples 64 trainer.max_steps="$(steps_of "$out/base32/decoder")"
for name in base32 base64 base64-samples; do
  printf '\n%s: %s steps of its base\n\n' "$name" "$(steps_of "$out/$name/decoder")"
  tail -n +3 "$out/$name/probes/busy.md"
done
