#!/usr/bin/env bash
# Everything that needs a GPU, in one command and less than 8 minutes, without network:
#
#     benchmarks/gpu_suite.sh [FOLDER]
#
# It needs torch, triton, numpy and pytest; nothing has to be installed from this repository. Every stage is a
# process with a limit of its own, and one that breaks stops no other; the exit status says whether all passed.
# The first stages say what the later ones would meet. Their JSON, the log and gpu_suite.json are written into
# FOLDER or $OUT, else into benchmarks/results, as they come, in place of those of an earlier run: whatever kills
# this loses nothing that was measured. At its end it prints a summary, and copies all to benchmarks/results.
# $PYTHON is the interpreter (python3), and $L2L_COMMIT names the commit where there is no git.
# L2L_SUITE_DEVICE=cpu tries out the script itself, with tiny sizes and no GPU, and copies nothing, as its
# figures mean nothing.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
device=${L2L_SUITE_DEVICE:-cuda}
folder=${1:-${OUT:-}}

results=$root/benchmarks/results
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
work=${folder:-$results}
[ "$device" = cpu ] && [ -z "$folder" ] && work=$scratch
mkdir -p "$work" || exit 1
rm -f "$work"/gpu_*
log=$work/gpu_suite.log
stages=()
all_passed=0

# describe ENDED: says in gpu_suite.json which stages there were, and whether all have been (true or false).
describe() {
    printf '{"device": "%s", "all_passed": %s, "ended": %s, "stages": [%s]}\n' "$device" \
        "$([ "$all_passed" -eq 0 ] && echo true || echo false)" "$1" "$(IFS=,; echo "${stages[*]:-}")" \
        > "$work/gpu_suite.json"
}

# stage NAME LIMIT COMMAND...: runs it for at most LIMIT seconds.
stage() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    echo "[$begin s] $name: starts, at most $limit s" | tee -a "$log"
    timeout -k 3 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    echo "[$SECONDS s] $name: ends with status $status" | tee -a "$log"
    [ "$status" -eq 0 ] || all_passed=1
    stages+=("{\"name\": \"$name\", \"seconds\": $((SECONDS - begin)), \"status\": $status}")
    describe false
}

# measure NAME LIMIT ARGUMENTS...: a stage that runs benchmarks/NAME.py and leaves gpu_NAME.json
# (gpu_tests.json for gpu_tests).
measure() {
    local name=$1 limit=$2
    shift 2
    stage "$name" "$limit" "$python" "$root/benchmarks/$name.py" --json "$work/gpu_${name#gpu_}.json" "$@"
}

if [ "$device" = cpu ]; then
    # Nothing waits for a machine here: limits that no load exceeds.
    stage smoke 1800 "$python" "$root/benchmarks/gpu_smoke.py" --device cpu
    measure kernel_throughput 1800 --device cpu --step-sizes 256 --bptt-sizes 256 --unroll 2
    measure optimizer_step 1800 --device cpu --width 1 --only zero-shot --squares 64 --turns 3
    measure gpu_tests 1800 --processes 1
    measure meta_step 1800 --unroll 2 --reps 2 --threads all --no-scaling
    measure time_to_quality 1800 --device cpu --budget-s 1 --evaluations 2 --optimizees 2 --horizon 3
else
    # They add up to less than 8 minutes.
    stage smoke 45 "$python" "$root/benchmarks/gpu_smoke.py" --device "$device"
    measure kernel_throughput 75 --device "$device" --compile-s 40
    measure optimizer_step 30 --device "$device" --only zero-shot
    measure gpu_tests 90 --limit-s 80
    measure meta_step 105 --device "$device" --threads all --limit-s 40
    stage kernel_sweep 50 "$python" "$root/benchmarks/kernel_throughput.py" --sweep --compile-s 25 \
        --device "$device" --json "$work/gpu_kernel_sweep.json"
    if command -v ncu > /dev/null; then
        stage ncu 25 ncu --section SpeedOfLight --section Occupancy --section WarpStateStats \
            --kernel-name 'regex:step_fwd|bptt_layer|nominal_step' --launch-count 4 \
            "$python" "$root/benchmarks/gpu_smoke.py" --kernels $((2 ** 22)) --device "$device"
    fi
    measure time_to_quality 55 --device "$device" --budget-s 30
fi
"$python" "$root/benchmarks/gpu_summary.py" "$work" 2>&1 | tee -a "$log"
describe true
if [ "$device" != cpu ] && [ "$work" != "$results" ]; then
    cp "$work"/gpu_* "$results"/ || all_passed=1
fi
exit "$all_passed"
