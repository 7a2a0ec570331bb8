#!/usr/bin/env bash
# Check the CUDA backend on a GPU: correctness, repeatability, memory errors, and speed.
#
#     bash benchmarks/gpu/check.sh [--dry] [FOLDER [STEP...]]     (gpu-results, all steps)
#     bash benchmarks/gpu/check.sh --smoke [FOLDER]               (the first step, a minute)
#
# Steps, the most informative first: smoke, short, correct, sanitize, timings, profile (skipped
# without ncu). FOLDER gets results.jsonl, log.txt, profile.csv and table.md, which is rewritten
# after each step. Each part is a process with its own time limit, so a part that hangs, crashes or
# fails does not stop the others; the check stops early only if the machine lacks something needed.
# The exit status is 0 if every part that ran passed. --dry needs no GPU: it tries the check itself,
# on a simulated GPU and on the CPU.
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

# Without the wheels of CUDA's compiler, it is found only through these variables.
toolkit=${CUDA_TOOLKIT:-/usr/local/cuda}
if [ -d "$toolkit" ]; then
    export CUDA_HOME=${CUDA_HOME:-$toolkit} CUDA_PATH=${CUDA_PATH:-$toolkit}
    PATH=$PATH:$toolkit/bin
fi
export GPU_RESULTS PATH PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS=0

# run NAME LIMIT COMMAND...: output goes to the log, exit status and time to the results.
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

# tests NAME LIMIT EXPRESSION FILES...: fails if a test fails or is skipped, or if none runs.
backend=cupy select= dtypes=(float32 float64 float16 bfloat16)
if [ "$dry" ]; then  # thread by thread on the CPU, so only a few cases
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

# In parallel, as most of the time goes to compiling and to the oracle, on the CPU.
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

# One process per dtype, as compiling a dtype's kernels takes longer than checking them.
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
