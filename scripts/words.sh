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
while [[ ${1:-} == --* ]]; do
  [[ $# -ge 2 ]] || fail "$1 needs a value"
  case $1 in
    --out) out=$2 ;;
    --minutes) minutes=$2 ;;
    --num) num=$2 ;;
    --probe) probe=$2 ;;
    --set) read -ra settings <<<"$2" ;;
    *) fail "unknown option $1; the head of $0 lists them" ;;
  esac
  shift 2
done
[[ $# -eq 0 ]] || fail "unknown argument $1; the head of $0 lists the options"

half=$(awk -v m="$minutes" 'BEGIN { printf "%.3f", m / 2 }')
data=(data.path="$out/data")
embedded=("${data[@]}" data.embeddings="$out/embeddings")

train_decoder() { # NAME SETTING...
  run train-decoder run="$out/$1" "${embedded[@]}" experiment=busy64_decoder trainer.max_minutes="$minutes" "${@:2}" \
    "${settings[@]}"
}

[[ -e $out/data/verdict ]] || run unclip data shapes --out "$out/data" --num "$num" --size 64 --signs 1
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
