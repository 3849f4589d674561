#!/usr/bin/env bash
# Submit the whole chain with its dependencies, and print the graph of jobs:
#     scripts/slurm/pipeline.sh settings.sh
# settings.sh says where, on what and how, in bash; only the first two lines are needed:
#     data=/data/pictures                                     # a folder with splits
#     runs=/runs/a                                            # clip, embeddings, prior, decoder, ... are written there
#     all_job=(--partition=gpu --account=me)                  # options of sbatch for every job
#     clip=(experiment=paper_clip);  clip_job=(--nodes=4 --ntasks-per-node=8 --gres=gpu:8)
#     clip_from=/runs/imported                                # instead: a CLIP that is there already
#     embed=(dtype=float16);         embed_job=(--array=0-15 --gres=gpu:1)
#     prior=(experiment=paper_diffusion_prior);  prior_job=(...)
#     decoder=(model.conditioning.text=transformer);  decoder_job=(...)
#     upsamplers=(upsampler-256 upsampler-1024)               # the names of their runs; () for none
#     upsampler_256=(model.low_size=64 model.image_size=256);  upsampler_256_job=(...)
#     evaluate=(unclip verdict --from /runs/a --data /data/shapes --out /runs/a/verdict);  evaluate_job=(...)
# A job whose predecessor failed is taken from the queue. The same line again goes on: what is finished ends at once.
set -euo pipefail
shopt -s inherit_errexit # a refused sbatch ends this, within $(...) too
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 1 ] && [ -f "$1" ] || { echo "usage: $0 SETTINGS; the head of this file shows such a file" >&2; exit 2; }
data="" runs="" clip_from="" upsamplers=(upsampler) evaluate=()
source "$1"
[ -n "$data" ] && [ -n "$runs" ] || { echo "$1 must set data=... and runs=..." >&2; exit 2; }

submit() { # name, jobs to wait for (17:18 or nothing), script, command...
    local name=$1 after=$2 script=$3 key=${1//-/_} id
    shift 3
    local -n options=${key}_job
    id=$(sbatch --parsable --job-name="$name" ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} \
        "${all_job[@]}" "${options[@]}" "$here/$script" "$@") || return
    id=${id%%;*} # id;cluster where there are several
    printf '%-16s %8s   %s\n' "$name" "$id" "${after:+after ${after//:/, }}" >&2
    echo "$id"
}
settle() { local n; for n in "$@"; do declare -p "$n" >/dev/null 2>&1 || declare -ga "$n=()"; done; } # unset: empty
settle all_job clip clip_job embed embed_job prior prior_job decoder decoder_job evaluate_job
export UNCLIP_RUN="" # of evaluate only, whose command may name none
embedded=(data.path="$data" data.embeddings="$runs/embeddings")

first=""
[ -n "$clip_from" ] || first=$(submit clip "" train.sbatch train-clip run="$runs/clip" data.path="$data" "${clip[@]}")
embeddings=$(submit embed "$first" embed.sbatch run="$runs/embeddings" clip="${clip_from:-$runs/clip}" data="$data" "${embed[@]}")
trained=$(submit prior "$embeddings" train.sbatch train-prior run="$runs/prior" "${embedded[@]}" "${prior[@]}")
id=$(submit decoder "$embeddings" train.sbatch train-decoder run="$runs/decoder" "${embedded[@]}" "${decoder[@]}")
trained+=:$id
for name in "${upsamplers[@]}"; do
    settle "${name//-/_}" "${name//-/_}_job"
    declare -n own=${name//-/_}
    id=$(submit "$name" "$embeddings" train.sbatch train-upsampler run="$runs/$name" data.path="$data" "${own[@]}")
    trained+=:$id
    unset -n own
done
[ ${#evaluate[@]} -gt 0 ] || evaluate=(unclip-evaluate prior prior="$runs/prior" "${embedded[@]}" run="$runs/evaluation")
UNCLIP_RUN=$runs/evaluation submit evaluate "$trained" train.sbatch "${evaluate[@]}" >/dev/null
train="prior ∥ decoder$(printf ' ∥ %s' "${upsamplers[@]}")"
[ ${#upsamplers[@]} -gt 0 ] || train="prior ∥ decoder"
echo "${first:+clip → }embed → $train → evaluate"
