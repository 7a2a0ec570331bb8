#!/usr/bin/env bash
# The CUDA backend on a GPU: right, repeatable, clean, and how fast. Under ten minutes.
#
#     bash benchmarks/gpu/check.sh [FOLDER]      (gpu-results where none is given)
#
# FOLDER gets results.jsonl, log.txt and table.md. Each section is a process of its own with a time
# limit: what hangs or crashes does not keep the others from running. What is timed runs alone. The
# exit status is 0 if everything that ran was right and nothing was cut short.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-gpu-results}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out/results.jsonl" "$out/log.txt" "$out/table.md"

# run NAME LIMIT COMMAND...: its output goes to the log, how it ended to the results.
run() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    timeout -k 5 "$limit" "$@" 2>&1 |
        sed -u "s/^/$name: /" >>"$out/log.txt"
    code=${PIPESTATUS[0]}
    printf '{"section": "end", "name": "%s", "code": %d, "seconds": %d}\n' \
        "$name" "$code" $((SECONDS - begin)) >>"$out/results.jsonl"
    echo "$name: exit status $code after $((SECONDS - begin)) s"
}

# section NAME LIMIT ARGUMENTS...: a section of check.py.
section() {
    run "$1" "$2" "$python" "$here/check.py" "${@:3}" --output "$out"
}

# The tests, with CuPy's arrays in place of NumPy's; as many as there is time for.
suite() {
    cd "$here/../.." || return
    run suite 185 "$python" -m pytest -q --backend cupy --maxfail 10 -p no:cacheprovider \
        tests/test_accuracy.py tests/test_results.py tests/test_errors.py tests/test_halves.py
}

section environment 40 environment

# Most of this is compiling and the oracle, on the CPU: side by side.
for dtype in float32 float64 float16 bfloat16; do
    section "correctness $dtype" 185 correctness --dtype "$dtype" --seconds 165 &
done
section repeat 185 repeat --seconds 165 &
section torch 185 torch --seconds 165 &
section graph 120 graph &
section sanitize 185 sanitize --seconds 175 &
section large 185 large --seconds 150 &
if "$python" -c "import pytest, hypothesis" 2>/dev/null; then suite & fi
wait

section host 60 host --seconds 45
section timings 250 timings --seconds 225

"$python" "$here/table.py" "$out/results.jsonl" --markdown "$out/table.md" --summary
