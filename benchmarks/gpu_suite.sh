#!/usr/bin/env bash
# Everything that only a GPU can prove or measure, in one command of less than nine minutes.
#
#   benchmarks/gpu_suite.sh OUT            all stages
#   benchmarks/gpu_suite.sh OUT STAGE ...  some of them, in the order of the list
#   benchmarks/gpu_suite.sh --list         their names, and what each does
#
# Needs a python3 ($PYTHON names another) with torch, triton, numpy, pytest, transformers and
# tokenizers; no network, nothing is installed. Into the folder OUT go
#
#   suite.log                  what every stage printed
#   suite.json                 each stage's outcome and seconds
#   <device>/<stage>.jsonl     every measurement, as benchmarks/records.py describes it
#   table.txt                  written last: the figures beside the bars they must pass
#
# A stage ends at its deadline whatever it is doing. What an earlier stage leaves of its time is
# the next one's; what it would like beyond its own is never taken from those that follow.
#
# Exit status: 0 all passed; 1 a stage failed or ran out of time; 2 wrong arguments; 3 no GPU (then
# nothing is run and OUT is not touched).
set -u

STAGES=(machine parity step sanitizer speed training)
# Seconds that each stage can count on. Their sum is the time of the whole suite.
declare -A LEAST=([machine]=25 [parity]=100 [step]=65 [sanitizer]=60 [speed]=80 [training]=200)
declare -A MEANING=(
    [machine]="versions; measured ceilings: copy, bf16 and fp32 matrix products"
    [parity]="each kernel in each configuration against float64 and PyTorch's; repeated bits"
    [step]="captured = eager, gradients against transformers, memory, exact resume, self-check"
    [sanitizer]="compute-sanitizer memcheck and racecheck on small shapes, where it is installed"
    [speed]="each operation's speed beside PyTorch's"
    [training]="training steps: speed and peak memory beside the rivals"
)
LIMIT=${GPU_SUITE_SECONDS:-530}
PYTHON=${PYTHON:-python3}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ------------------------------------------------------------------------------------- the stages
# Each is a function. It returns 0 (passed) or not, and may leave a line about it in $WORK/note.

stage_machine() {
    nvidia-smi
    bounded "$PYTHON" -c "from benchmarks import machine; print(machine.versions())"
    bounded "$PYTHON" -m benchmarks.ceilings --output "$OUT" --seconds 5
}

stage_parity() { # nearly all of its time is compiling: as many processes as there are cores
    tests_in_parallel 14 tests/gpu/test_gpu_kernels.py
}

stage_step() {
    tests_in_parallel 6 tests/gpu/test_gpu_step.py tests/gpu/test_gpu_model.py \
        tests/gpu/test_gpu_memory.py tests/gpu/test_gpu_resume.py tests/gpu/test_gpu_selfcheck.py
}

stage_sanitizer() {
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>&-) || {
        echo "compute-sanitizer is not installed" | tee "$WORK/note"
        return 0
    }
    # compiled outside the checker, a part in each process; and every tensor an allocation of its
    # own, so that one element too far is seen
    local part parts=() status=0
    for part in $("$PYTHON" -m tests.gpu.small_shapes --list); do
        bounded "$PYTHON" -m tests.gpu.small_shapes "$part" &
        parts+=($!)
    done
    for part in "${parts[@]}"; do wait "$part" || return; done
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    bounded "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 9 \
        --print-limit 20 "$PYTHON" -m tests.gpu.small_shapes >"$WORK/memcheck" 2>&1 &
    local memcheck=$!
    bounded "$sanitizer" --tool racecheck --error-exitcode 9 --print-limit 20 \
        "$PYTHON" -m tests.gpu.small_shapes >"$WORK/racecheck" 2>&1 || status=$?
    wait $memcheck || status=$?
    tail -n 60 "$WORK/memcheck" "$WORK/racecheck"
    grep -ho "[A-Z]* SUMMARY.*" "$WORK/memcheck" "$WORK/racecheck" | paste -sd ";" >"$WORK/note"
    return $status
}

# These two measure what the table asks for. Everybody and everything else is measured by the same
# programs without --providers, which take longer than a suite may.

stage_speed() {
    bounded "$PYTHON" -m benchmarks.kernels --output "$OUT" \
        --providers "triton,SDPA flash,SDPA cuDNN" --seconds $(($(left) * 3 / 4))
}

stage_training() {
    local status=0
    bounded "$PYTHON" -m benchmarks.steps --output "$OUT" \
        --only "GPT-2 124M B=16 T=1024 micro-batches=1 " \
        --providers "triton captured,torch.compile" --seconds $(($(left) * 3 / 5)) || status=$?
    bounded "$PYTHON" -m benchmarks.steps --output "$OUT" \
        --only "seed-sized B=64 T=256 micro-batches=1 " \
        --providers "triton captured,torch.compile reduce-overhead" \
        --seconds $(($(left) - 10)) || status=$?
    return $status
}

# ------------------------------------------------------------------------------------ their tools

left() { # seconds until this stage's deadline, at least 1
    local seconds=$((DEADLINE - SECONDS))
    echo $((seconds > 1 ? seconds : 1))
}

bounded() { # run a command; at the deadline it is told to stop, and 5 seconds later it is killed
    timeout -k 5 "$(left)" "$@"
}

tests_in_parallel() { # PROCESSES FILE...: pytest on the files, the tests dealt out to processes
    local most=$1 status=0 i pids=()
    shift
    local cores
    cores=$(nproc)
    local n=$((cores < most ? cores : most))
    for ((i = 0; i < n; i++)); do
        bounded "$PYTHON" -m pytest -p tests.gpu.share --share "$i/$n" -p no:cacheprovider \
            -o addopts= -v -rfE --tb=short --maxfail=20 "$@" >"$WORK/share.$i" 2>&1 &
        pids+=($!)
    done
    for i in "${!pids[@]}"; do
        wait "${pids[i]}"
        local code=$? # 5: no test fell to this process
        ((code == 0 || code == 5)) || status=$code
        echo "--- process $i of $n: exit status $code"
        tail -c 20000 "$WORK/share.$i"
    done
    summed_counts "$WORK"/share.* >"$WORK/note"
    rm -f "$WORK"/share.*
    return $status
}

summed_counts() { # pytest's last lines, added up: "514 passed, 2 skipped"
    tail -qn 1 "$@" | grep -Eo '[0-9]+ (passed|failed|skipped|errors?)' | sed 's/errors$/error/' |
        awk '{n[$2] += $1} END {for (k in n) printf "%s%d %s", s++ ? ", " : "", n[k], k; print ""}'
}

# ----------------------------------------------------------------------------------- the sequence

usage() {
    sed -n '4,6s/^# *//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

list_stages() {
    local name
    for name in "${STAGES[@]}"; do printf '%-10s %s\n' "$name" "${MEANING[$name]}"; done
}

choose_stages() { # STAGE...: sets CHOSEN, in the order of STAGES
    local name
    for name in "$@"; do
        [[ -n ${MEANING[$name]:-} ]] || {
            echo "gpu_suite: stage: found '$name'; accepted: ${STAGES[*]}" >&2
            exit 2
        }
    done
    CHOSEN=()
    for name in "${STAGES[@]}"; do
        [[ $# -eq 0 || " $* " == *" $name "* ]] && CHOSEN+=("$name")
    done
}

require_gpu() {
    local reason
    reason=$("$PYTHON" - 2>&1 <<'PY'
import sys
try:
    import torch
except ImportError as missing:
    sys.exit(f"no GPU can be used: {missing}")
if not torch.cuda.is_available():
    sys.exit(f"no GPU: torch {torch.__version__} sees none")
PY
    ) && return
    echo "gpu_suite: ${reason##*$'\n'}; nothing was run" >&2
    exit 3
}

run_stage() { # NAME SECONDS: sets OUTCOME and appends to the log and to suite.json's lines
    local name=$1 begin=$SECONDS status note
    DEADLINE=$((SECONDS + $2))
    : >"$WORK/note"
    echo "=== $name: ${MEANING[$name]} (at most $2 s)"
    ("stage_$name") >"$WORK/log" 2>&1 </dev/null
    status=$?
    case $status in
        0) OUTCOME=passed ;;
        124 | 137) OUTCOME="out of time" ;;
        *) OUTCOME=failed ;;
    esac
    note=$(tr -d '"\\\n' <"$WORK/note")
    { echo "=== $name: $OUTCOME"; tail -c 2000000 "$WORK/log"; } >>"$OUT/suite.log"
    printf '{"stage": "%s", "outcome": "%s", "seconds": %d, "note": "%s"}\n' \
        "$name" "$OUTCOME" $((SECONDS - begin)) "$note" >>"$WORK/outcomes"
    echo "    $OUTCOME in $((SECONDS - begin)) s${note:+: $note}"
}

main() {
    [[ ${1:-} == --list ]] && { list_stages; exit 0; }
    [[ $# -ge 1 && $1 != -* ]] || usage
    local out=$1 name later reserved all_passed=0
    shift
    choose_stages "$@"
    require_gpu
    mkdir -p "$out" && OUT=$(cd "$out" && pwd) || exit 2
    WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
    cd "$ROOT" || exit 2
    export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    : >"$OUT/suite.log"
    SECONDS=0
    for i in "${!CHOSEN[@]}"; do
        name=${CHOSEN[i]}
        reserved=0
        for later in "${CHOSEN[@]:i+1}"; do reserved=$((reserved + LEAST[$later] * LIMIT / 530)); done
        run_stage "$name" $((LIMIT - SECONDS - reserved))
        [[ $OUTCOME == passed ]] || all_passed=1
    done
    { echo "["; sed '$!s/$/,/' "$WORK/outcomes"; echo "]"; } >"$OUT/suite.json"
    timeout 30 "$PYTHON" -m benchmarks.gpu_table "$OUT" 2>&1 | tee "$OUT/table.txt"
    exit $all_passed
}

main "$@"
