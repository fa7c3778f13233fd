#!/usr/bin/env bash
# Runs every bench, draws the plots, and writes what they say into benches/README.md. Some five minutes, on a machine that
# does nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

# What else the machine does.
load=$(cut -d ' ' -f 1 /proc/loadavg)
results=$(mktemp)
trap 'rm -f "$results" "$results.md"' EXIT

run() {
    printf '\n### `%s`\n' "$1" >>"$results"
    printf '==> %s\n' "$1"
    # One that fails has said why in its table.
    cargo bench --locked --quiet --package benches --bench "$@" | tee -a "$results" || printf '==> %s failed\n' "$1" >&2
}

cargo bench --locked --package benches --no-run
printf '%s, %s with %s cores. Load when it began: %s.\n' "$(rustc --version | cut -d ' ' -f 1-2)" \
    "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)" "$(nproc)" "$load" >>"$results"
if command -v valgrind >/dev/null; then
    # What has grown or misses a target that was met is said before it is recorded, and does not end up in the page.
    run instructions -- --update
else
    echo 'valgrind is missing: instructions are not counted (Debian: apt-get install valgrind)' >&2
fi
run overhead
run allocations
run contention -- --plot
run herd
run stall -- --plot
run subjects
run errors

# Between the marks, and without more than one empty line at a time.
awk -v results="$results" '
    /^<!-- results end -->/ { skip = 0 }
    !skip { print }
    /^<!-- results begin -->/ { skip = 1; print ""; while ((getline line < results) > 0) print line; print "" }
' benches/README.md | cat -s >"$results.md"
cat "$results.md" >benches/README.md
