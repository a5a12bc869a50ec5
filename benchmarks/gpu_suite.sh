#!/usr/bin/env bash
# Everything that needs a GPU, in one command and less than 8 minutes, without network:
#
#     benchmarks/gpu_suite.sh [FOLDER]
#
# It needs torch, triton, numpy and pytest; nothing has to be installed from this repository. Every stage is a
# process with a limit of its own, and one that breaks stops no other; the exit status says whether all passed.
# JSON and a log go to benchmarks/results, and to FOLDER or $OUT if given. $PYTHON is the interpreter (python3),
# and $L2L_COMMIT names the commit where there is no git. L2L_SUITE_DEVICE=cpu tries out the script itself, with
# tiny sizes and no GPU; it writes to FOLDER or $OUT only, as its figures mean nothing.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
device=${L2L_SUITE_DEVICE:-cuda}
folder=${1:-${OUT:-}}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/gpu_suite.log
stages=()
all_passed=0

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
    measure gpu_tests 1800 --processes 1
    measure kernel_throughput 1800 --device cpu --step-sizes 256 --bptt-sizes 256 --unroll 2
    measure meta_step 1800 --unroll 2 --reps 2 --threads all --no-scaling
    measure time_to_quality 1800 --device cpu --budget-s 1 --evaluations 2 --optimizees 2 --horizon 3
else
    # They add up to less than 8 minutes.
    measure gpu_tests 125 --limit-s 112
    measure kernel_throughput 105 --device "$device"
    measure meta_step 95 --device "$device" --threads all
    measure time_to_quality 75 --device "$device" --budget-s 40
    stage kernel_sweep 60 "$python" "$root/benchmarks/kernel_throughput.py" --sweep --compile-s 35 \
        --device "$device" --json "$work/gpu_kernel_sweep.json"
fi

printf '{"device": "%s", "all_passed": %s, "stages": [%s]}\n' "$device" \
    "$([ "$all_passed" -eq 0 ] && echo true || echo false)" "$(IFS=,; echo "${stages[*]}")" \
    > "$work/gpu_suite.json"

targets=()
[ "$device" = cpu ] || targets+=("$root/benchmarks/results")
[ -z "$folder" ] || targets+=("$folder")
for target in ${targets[@]+"${targets[@]}"}; do
    # A folder that cannot be written must not keep the other from its files.
    mkdir -p "$target" && cp "$work"/gpu_* "$target"/ || all_passed=1
done
exit "$all_passed"
