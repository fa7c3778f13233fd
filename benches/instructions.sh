#!/usr/bin/env bash
# Instructions per request, counted by valgrind and compared with benches/instructions.txt: fails when one has grown by
# more than 5 %, or by more than 1 % to beyond a target that what is recorded meets. `--update` says so too, and records
# them anew.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v valgrind >/dev/null; then
    echo 'valgrind is missing: instructions cannot be counted (Debian: apt-get install valgrind)' >&2
    exit 1
fi
exec cargo bench --locked --package benches --bench instructions -- "$@"
