#!/usr/bin/env bash
# The CUDA backend on a GPU: right, repeatable, clean, and how fast.
#
#     bash benchmarks/gpu/check.sh [--dry] [FOLDER [STEP...]]     (gpu-results, all steps)
#     bash benchmarks/gpu/check.sh --smoke [FOLDER]               (the first step, a minute)
#
# Steps, those that tell most first: smoke, short, correct, sanitize, timings, profile. FOLDER gets
# results.jsonl, log.txt and table.md, which is written anew after each step. Whatever runs is a
# process with a time limit of its own, so that what hangs, crashes or fails keeps nothing else from
# running. The exit status is 0 if all that was asked for ran and was right. --dry needs no GPU: it
# tries the check itself, on a simulated one and on the CPU.
set -u
cd "$(dirname "$0")/../.." || exit
steps=(smoke short correct sanitize timings profile) dry=
case ${1:-} in
    --smoke) shift && set -- "${1:-gpu-results}" smoke ;;
    --dry) shift && dry=--dry ;;
esac
[ $# -gt 1 ] && steps=("${@:2}")
mkdir -p "${1:-gpu-results}"
GPU_RESULTS=$(cd "${1:-gpu-results}" && pwd)
log=$GPU_RESULTS/log.txt table=$GPU_RESULTS/table.md
rm -f "$GPU_RESULTS"/{results.jsonl,log.txt,table.md,profile.csv}
python=${PYTHON:-python3}

# Without its wheels, CUDA's compiler is found through these alone.
toolkit=${CUDA_TOOLKIT:-/usr/local/cuda}
if [ -d "$toolkit" ]; then
    export CUDA_HOME=${CUDA_HOME:-$toolkit} CUDA_PATH=${CUDA_PATH:-$toolkit}
    PATH=$PATH:$toolkit/bin
fi
export GPU_RESULTS PATH PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS=0

# run NAME LIMIT COMMAND...: its output goes to the log, how it ended to the results.
run() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    timeout -k 2 "$limit" "$@" 2>&1 | sed -u "s/^/$name: /" >>"$log"
    code=${PIPESTATUS[0]}
    printf '{"what": "end", "name": "%s", "code": %d, "seconds": %d}\n' \
        "$name" "$code" $((SECONDS - begin)) >>"$GPU_RESULTS/results.jsonl"
    echo "$name: exit status $code after $((SECONDS - begin)) s"
    return "$code"
}

benchmark() { run "$1" "$2" "$python" -m benchmarks.gpu "${@:3}" $dry; }

# tests NAME LIMIT EXPRESSION FILES...: a run of tests fails if none ran or one was skipped.
backend=cupy select= dtypes=(float32 float64 float16 bfloat16)
if [ "$dry" ]; then  # thread by thread: a little of everything
    backend=simulator dtypes=(bfloat16)
    select=" and (columns or [2-b or (60 or 2048) and bfloat16 or streams or refused or modules)"
    export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
fi
pytest=("$python" -m pytest -v --tb=short -p no:cacheprovider --no-skips --backend "$backend")
tests() { run "$1" "$2" "${before[@]}" "${pytest[@]}" -k "$3$select" "${@:4}"; }
before=()
on_gpu=tests/cuda/test_on_gpu.py

smoke() {
    benchmark versions 40 versions || { echo "stopped: see $log" && return 1; }
    for dtype in "${dtypes[@]}"; do
        for traversal in rows columns; do
            [ "$dry $traversal" = "--dry rows" ] && continue
            tests "smoke $dtype $traversal" 60 "smoke and [$dtype and $traversal" $on_gpu &
        done
    done
    wait
}

short() { benchmark short 75 short --seconds 65; }

# Most of this is compiling and the oracle, on the CPU: side by side.
correct() {
    local file cupys="not libraries and not torch and not jax and not array_api"
    for dtype in "${dtypes[@]}"; do tests "cases $dtype" 170 "cases and -$dtype]" $on_gpu & done
    for part in large repeat torch graph; do tests $part 170 "$part" $on_gpu & done
    if [ ! "$dry" ]; then
        for file in accuracy errors halves metamorphic moments properties results; do
            tests "suite $file" 170 "$cupys" "tests/test_$file.py" &
        done
    fi
    wait
}

# Each process compiles all kernels of a dtype once, which takes longer than what is checked.
sanitize() {
    local few=
    [ "$dry" ] && few=" and kept"
    for tool in memcheck racecheck; do
        [ "$dry" ] || before=(compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20)
        for dtype in "${dtypes[@]}"; do
            tests "$tool $dtype" 120 "smoke and [$dtype$few" $on_gpu &
        done
        [ "$dry" ] && break
    done
    wait
    before=()
}

timings() { benchmark timings 150 timings --seconds 135; }

profile() {
    local metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,dram__bytes_read.sum,dram__bytes_write.sum,launch__registers_per_thread
    metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
    local ncu=(ncu --clock-control none --csv --page raw --metrics "$metrics" --kernel-name-base
        mangled --kernel-name "regex:nbnorm" --log-file "$GPU_RESULTS/profile.csv")
    [ "$dry" ] || command -v ncu >/dev/null || { echo "profile: no ncu" && return; }
    [ "$dry" ] && ncu=()
    run profile 60 "${ncu[@]}" "$python" -m benchmarks.gpu profile $dry
}

for step in "${steps[@]}"; do
    "$step"
    code=$?
    "$python" -m benchmarks.gpu.table "$GPU_RESULTS" >"$table"
    right=$?
    [ "$step $code" = "smoke 1" ] && break
done
cat "$table"
exit "$right"
