#!/usr/bin/env bash
# Train several priors on one set of embeddings, each for the same time and with several seeds, evaluate them on samples that
# none has seen, and print markdown tables.
#
# usage: scripts/compare_priors.sh --data DATA --embeddings FOLDER [options] [MODEL...]
#   --out FOLDER      where runs and table.md go (runs/compare_priors); the same command again goes on where it stopped
#   --minutes M       of training for each run (5)
#   --seeds "0 1 2"   one run of each model for each seed
#   --splits "val"    the splits to evaluate on; for emoji "val test_styles"
#   --chain FOLDER    runs clip, decoder and upsampler* of the same CLIP, to draw with each prior: KID and style accuracy on
#                     the splits test and test_styles of data that name styles and concepts. May be given in a later call
#   --num N           pictures of each of the two for --chain (150)
#   --set "K=V ..."   further settings of every train-prior
#
# A MODEL is a value of train-prior's model=, with settings of its own after it (experiment=... replaces compare_prior) and a
# label before it for the table: "mlp_prior" or "4 draws: diffusion_prior model.num_draws=4". Without any: all six, in sizes
# for some thousand pictures and a few minutes on a CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."

data='' embeddings='' out=runs/compare_priors minutes=5 seeds='0 1 2' splits=val chain='' num=150 settings=()
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
    --splits) splits=$2 ;;
    --chain) chain=$2 ;;
    --num) num=$2 ;;
    --set) read -ra settings <<<"$2" ;;
    *) fail "unknown option $1; the head of $0 lists them" ;;
  esac
  shift 2
done
[[ -n $data && -n $embeddings ]] || fail "give --data and --embeddings"
for stage in clip decoder; do
  [[ -z $chain || -e $chain/$stage ]] || fail "--chain $chain has no $stage"
done

models=("$@")
if [[ $# -eq 0 ]]; then
  small='model.net.width=256 model.net.depth=4 model.net.num_heads=4'
  text='model.net.text.width=128 model.net.text.depth=2 model.net.text.num_heads=2'
  models=("diffusion_prior $small model.net.text=tokens model.sampling.sampler.name=ddim model.sampling.sampler.num_steps=16"
    "ar_prior $small $text model.explained_variance=0.95 model.num_buckets=128"
    "eclipse_prior $small model.net.text=tokens" mlp_prior linear_prior identity)
fi

run() {
  printf '\n$ %s\n' "$*"
  "$@"
}

given=(data.path="$data" data.embeddings="$embeddings")

# one LABEL SEED NAME SETTING...: train, which returns at once where it is done
one() {
  local label=$1 seed=$2 name=$3
  local common=(model="$name" seed="$seed" trainer.max_minutes="$minutes" logger=none)
  [[ " ${*:4} " == *' experiment='* ]] || common+=(experiment=compare_prior)
  run train-prior run="$out/$label/seed-$seed" "${given[@]}" "${common[@]}" "${settings[@]}" "${@:4}"
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
read -ra chosen <<<"$splits"
run python scripts/compare_priors_measure.py "$out" --data "$data" --embeddings "$embeddings" --splits "${chosen[@]}" \
  ${chain:+--chain "$chain"} --num "$num"
python scripts/compare_priors_table.py "$out"
