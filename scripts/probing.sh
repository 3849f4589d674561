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
