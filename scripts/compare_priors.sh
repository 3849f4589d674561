#!/usr/bin/env bash
# Train several priors on one set of embeddings, each for the same time and with several seeds, evaluate them on samples that
# none has seen, and print one markdown table.
#
# usage: scripts/compare_priors.sh --data DATA --embeddings FOLDER [options] [MODEL...]
#   --out FOLDER      where runs and table.md go (runs/compare_priors); the same command again goes on where it stopped
#   --minutes M       of training for each run (5)
#   --seeds "0 1 2"   one run of each model for each seed
#   --split NAME      the split to evaluate on (val)
#   --chain FOLDER    runs clip, decoder and upsampler* of the same CLIP, to draw pictures with each prior (`unclip measure`)
#   --judge RUN       a CLIP of another seed for --chain
#   --num N           pictures a split for --chain (600)
#   --set "K=V ..."   further settings of every train-prior
#
# A MODEL is a value of train-prior's model=, with settings of its own after it (experiment=... replaces compare_prior) and a
# label before it for the table: "mlp_prior" or "4 draws: diffusion_prior model.num_draws=4". Without any: all that this version
# has.
set -euo pipefail
cd "$(dirname "$0")/.."

data='' embeddings='' out=runs/compare_priors minutes=5 seeds='0 1 2' split=val chain='' judge='' num=600 settings=()
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
while [[ ${1:-} == --* ]]; do
  [[ $# -ge 2 ]] || fail "$1 needs a value"
  case $1 in
    --data) data=$2 ;;
    --embeddings) embeddings=$2 ;;
    --out) out=$2 ;;
    --minutes) minutes=$2 ;;
    --seeds) seeds=$2 ;;
    --split) split=$2 ;;
    --chain) chain=$2 ;;
    --judge) judge=$2 ;;
    --num) num=$2 ;;
    --set) read -ra settings <<<"$2" ;;
    *) fail "unknown option $1; the head of $0 lists them" ;;
  esac
  shift 2
done
[[ -n $data && -n $embeddings ]] || fail "give --data and --embeddings"
[[ -z $chain || -n $judge ]] || fail "--chain needs --judge RUN, a CLIP of another seed"

models=("$@")
if [[ $# -eq 0 ]]; then # the sizes of the emoji recipe
  small='model.net.width=256 model.net.depth=4 model.net.num_heads=4 model.net.text=tokens'
  all=("diffusion_prior $small model.sampling.sampler.name=ddim model.sampling.sampler.num_steps=16"
    ar_prior "eclipse_prior $small" mlp_prior linear_prior identity)
  for model in "${all[@]}"; do
    if [[ -f conf/model/${model%% *}.yaml ]]; then models+=("$model"); else echo "(no ${model%% *} in this version)"; fi
  done
fi

run() {
  printf '\n$ %s\n' "$*"
  "$@"
}

# one LABEL SEED NAME SETTING...: train, evaluate and, with --chain, draw
one() {
  local label=$1 seed=$2 name=$3 folder
  folder=$out/$label/seed-$seed
  local given=(data.path="$data" data.embeddings="$embeddings")
  local common=(model="$name" seed="$seed" trainer.max_minutes="$minutes" logger=none)
  [[ " ${*:4} " == *' experiment='* ]] || common+=(experiment=compare_prior)
  run train-prior run="$folder" "${given[@]}" "${common[@]}" "${settings[@]}" "${@:4}"
  [[ -s $folder/evaluation.json ]] ||
    run unclip-evaluate prior run="$folder" prior="$folder" "${given[@]}" data.val_split="$split" data.max_val=10000 seed="$seed"
  [[ -n $chain && ! -s $folder/chain/measures.json ]] || return 0
  mkdir -p "$folder/chain"
  local stage
  for stage in "$chain"/clip "$chain"/decoder "$chain"/upsampler*; do
    [[ ! -e $stage ]] || ln -sfn "$(realpath "$stage")" "$folder/chain/$(basename "$stage")"
  done
  ln -sfn "$(realpath "$folder")" "$folder/chain/prior"
  run unclip measure --from "$folder/chain" --data "$data" --judge "$judge" --num "$num" --seed "$seed"
}

parse() { # MODEL: sets label and words
  label=${1%% *}
  local rest=$1
  if [[ $1 == *': '* ]]; then label=${1%%: *} rest=${1#*: }; fi
  read -ra words <<<"$rest"
}
for model in "${models[@]}"; do # refuse before anything is trained
  parse "$model"
  [[ -f conf/model/${words[0]}.yaml ]] || fail "conf/model/${words[0]}.yaml does not exist: no such model"
done
for seed in $seeds; do
  for model in "${models[@]}"; do
    parse "$model"
    one "$label" "$seed" "${words[@]}"
  done
done
python scripts/compare_priors_table.py "$out"
