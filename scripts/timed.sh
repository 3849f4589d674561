# Sourced by demo.sh and emoji.sh: print each command, time it, run some side by side, and end with a report.
[[ $minutes =~ ^[0-9]*[.]?[0-9]+$ ]] || { printf 'error: %s is not a number of minutes\n' "$minutes" >&2; exit 2; }
started=$SECONDS
mkdir -p "$runs"
before=$(cat "$runs/minutes" 2>/dev/null || echo "$minutes")
if [[ $before != "$minutes" ]]; then # a CLIP that trains on would fit neither its embeddings nor the later stages
  printf 'error: %s holds a chain of %s minutes: give %s again, remove the folder, or name another one (make … RUNS=%s-%s)\n' \
    "$runs" "$before" "$before" "$runs" "$minutes" >&2
  exit 2
fi
echo "$minutes" >"$runs/minutes"
[[ -e $runs/timings.jsonl ]] && printf 'Going on in %s with what an earlier call has finished there; times are of this call only.\n' "$runs"
: >"$runs/timings.jsonl"

share() { LC_ALL=C awk -v m="$minutes" -v s="$1" 'BEGIN { printf "%.3f", m * s }'; } # of the minutes in all

run() {
  printf '\n$ %s\n' "$*"
  local before=$SECONDS
  "$@"
  printf '{"seconds": %d, "command": "%s"}\n' $((SECONDS - before)) "${*//\"/\\\"}" >>"$runs/timings.jsonl"
}

threads=${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}

# run_beside FUNCTION COMMAND...: both at once, on half of the cores each, since networks this small leave the other half
# idle. What the function prints comes after the command's output.
run_beside() {
  local side_log="$runs/$1.log" status=0
  printf '\n(beside the next command: %s, output in %s)\n' "${1//_/ }" "$side_log"
  export OMP_NUM_THREADS=$(((threads + 1) / 2))
  set -m # a process group of its own, so that the trap reaches the commands in it
  "$1" >"$side_log" 2>&1 &
  set +m
  side=$!
  trap 'kill -- "-$side" 2>/dev/null && wait "$side" || true' EXIT # it saves a checkpoint
  run "${@:2}"
  wait "$side" || status=$?
  trap - EXIT
  cat "$side_log"
  export OMP_NUM_THREADS=$threads
  return "$status"
}

# run_on_all_cores COMMAND...: training with a process for each of two cores where there is no GPU, for the same reason
run_on_all_cores() {
  local ranks=1
  [[ $threads -ge 2 && $(python -c 'import torch; print(torch.accelerator.is_available())') == False ]] && ranks=2
  export OMP_NUM_THREADS=$((threads / ranks))
  run "$@" trainer.devices="$ranks"
  export OMP_NUM_THREADS=$threads
}

cpu_seconds() { # user and system time of all finished commands; `times` must not run in a subshell, which has spent none
  times >"$runs/times.txt"
  cpu=$(LC_ALL=C awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += 60 * t[1] + t[2] } printf "%.0f", s }' "$runs/times.txt")
  rm "$runs/times.txt"
}

finish() {
  local seconds=$((SECONDS - started)) cpu
  cpu_seconds
  unclip report "$runs" --minutes "$minutes" --seconds "$seconds" --cpu-seconds "$cpu"
  printf '\n%s s on the clock, %s s of CPU time. Open %s/report.html\n' "$seconds" "$cpu" "$runs"
}
