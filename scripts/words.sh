#!/usr/bin/env bash
# Are written words garbled (the paper's fig. 16)? A chain for signs that say a word, with a base of 64 px, on which letters can be
# read, and no upsampler; beside it the GLIDE form: the same decoder without z_i, trained for the same time.
#
# usage: scripts/words.sh [options]
#   --out FOLDER     where data and runs go (runs/words); the same command again goes on where it stopped
#   --minutes M      of training for each of the two decoders (60); CLIP and prior get half of it
#   --num N          training pictures, each with a sign (20000)
#   --probe N        captions of the probe with words that training signs say, and as many with others (48)
#   --set "K=V ..."  further settings of every training
#
# FOLDER is a chain for unclip generate --from; FOLDER/text_decoder is the GLIDE form, FOLDER/probes what was found.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/probing.sh

out=runs/words minutes=60 num=20000 probe=48 settings=()
read_options "$@"

train_decoder() { # NAME SETTING...
  run train-decoder run="$out/$1" "${embedded[@]}" experiment=busy64_decoder trainer.max_minutes="$minutes" "${@:2}" \
    "${settings[@]}"
}

[[ -e $out/data/verdict/index.json ]] || run unclip data shapes --out "$out/data" --num "$num" --size 64 --signs 1
run train-clip run="$out/clip" "${data[@]}" experiment=busy_clip trainer.max_minutes="$half" "${settings[@]}"
run unclip-embed run="$out/embeddings" clip="$out/clip" data="$out/data" precision=bf16 \
  "columns=[image_emb,text_emb,tokens,text_seq]"
run train-prior run="$out/prior" "${embedded[@]}" experiment=demo_prior data.image_size=64 trainer.max_minutes="$half" \
  "${settings[@]}"
train_decoder decoder
train_decoder text_decoder model.conditioning.image=false
run unclip words-probe --from "$out" --text-decoder "$out/text_decoder" --out "$out/probes" --num "$probe"
for name in decoder text_decoder; do
  printf '\n%s: %s steps\n' "$name" "$(steps_of "$out/$name")"
done
