# Sourced by demo.sh and emoji.sh: print each command, time it, and end with a report.
started=$SECONDS
mkdir -p "$runs"
: >"$runs/timings.jsonl"

run() {
  printf '\n$ %s\n' "$*"
  local before=$EPOCHREALTIME
  "$@"
  awk -v a="$before" -v b="$EPOCHREALTIME" -v c="${*//\"/\\\"}" \
    'BEGIN { printf "{\"seconds\": %.1f, \"command\": \"%s\"}\n", b - a, c }' >>"$runs/timings.jsonl"
}

cpu_seconds() { # user and system time of all finished commands; `times` must not run in a subshell, which has spent none
  times >"$runs/times.txt"
  cpu=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += 60 * t[1] + t[2] } printf "%.0f", s }' "$runs/times.txt")
  rm "$runs/times.txt"
}

finish() {
  local seconds=$((SECONDS - started)) cpu
  cpu_seconds
  unclip report "$runs" --minutes "$minutes" --seconds "$seconds" --cpu-seconds "$cpu"
  printf '\n%s s on the clock, %s s of CPU time. Open %s/report.html\n' "$seconds" "$cpu" "$runs"
}
