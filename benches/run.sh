#!/usr/bin/env bash
# Runs every bench, draws the plot and writes the results into benches/README.md. Takes about five minutes on an idle machine.
set -euo pipefail
cd "$(dirname "$0")/.."

load=$(cut -d ' ' -f 1 /proc/loadavg)
results=$(mktemp)
trap 'rm -f "$results" "$results.md"' EXIT

run() {
    printf '\n### `%s`\n' "$1" >>"$results"
    printf '==> %s\n' "$1"
    # A bench that fails says why in its table.
    cargo bench --locked --quiet --package benches --bench "$@" | tee -a "$results" || printf '==> %s failed\n' "$1" >&2
}

cargo bench --locked --package benches --no-run
printf '%s, %s with %s cores. Load average at the start: %s.\n' "$(rustc --version | cut -d ' ' -f 1-2)" \
    "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)" "$(nproc)" "$load" >>"$results"
run overhead
run allocations
run contention
run herd
run stall -- --plot
run subjects
run errors
run fleet
if command -v valgrind >/dev/null; then
    run instructions -- --update
else
    echo 'valgrind is missing; install it to count instructions (Debian: apt-get install valgrind)' >&2
fi

# Replaces the text between the markers and collapses empty lines.
awk -v results="$results" '
    /^<!-- results end -->/ { skip = 0 }
    !skip { print }
    /^<!-- results begin -->/ { skip = 1; print ""; while ((getline line < results) > 0) print line; print "" }
' benches/README.md | cat -s >"$results.md"
cat "$results.md" >benches/README.md
