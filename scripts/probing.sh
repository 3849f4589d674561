# Sourced by binding.sh, busy.sh and words.sh: end with a message, print each command, and tell how far a run was trained.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

run() {
  printf '\n$ %s\n' "$*"
  "$@"
}

steps_of() { sed -n 's/^  "step": \([0-9]*\).*/\1/p' "$1/artifact/manifest.json"; }

# read_options ARGUMENT...: of busy.sh and words.sh, into out, minutes, num, probe and settings; half of the minutes, and the
# settings that name the data
read_options() {
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
  half=$(LC_ALL=C awk -v m="$minutes" 'BEGIN { printf "%.3f", m / 2 }')
  data=(data.path="$out/data")
  embedded=("${data[@]}" data.embeddings="$out/embeddings")
}
