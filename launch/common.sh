# shellcheck shell=bash
# What the scripts share. They source it below their block of variables, which it reads.

# SLURM's --signal reaches every process of a step. Ignored is what the launcher inherits through exec, until it and the
# workers have handlers of their own; by default this shell, or Python while it starts, would die of it.
trap '' USR1

# One line on stderr and exit status 2; nothing has started yet. SCRIPT_NAME: where $0 does not say it (SLURM).
refuse() {
    printf 'launch/%s: error: %s\n' "${SCRIPT_NAME:-${0##*/}}" "$*" >&2
    # A task of srun: let the line through first, as srun ends the step, its output too, on the first bad exit.
    [[ -z ${SLURM_PROCID:-} ]] || sleep 2
    exit 2
}

# VERB is one that several processes may run.
require_verb() {
    [[ $VERB == train || $VERB == remove-norms ]] || refuse "VERB=$VERB: should be train or remove-norms"
}

# require_number NAME LOWEST HIGHEST: the variable of that name holds a whole number in that range.
require_number() {
    local value=${!1}
    if ! [[ $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2 || 10#$value > $3)); then
        refuse "$1=$value: should be a whole number from $2 to $3"
    fi
}

# The GPUs that a process started here would see. CUDA_VISIBLE_DEVICES wins, as it does for CUDA: "", -1 and names that
# are none (SLURM writes NoDevFiles) hide every GPU.
count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^([0-9]+|(GPU|MIG)-.+)$' || true
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
    fi
}

# choose_processes WITHOUT_GPU: NPROC_PER_NODE where it is empty, and the CPU threads of each process.
choose_processes() {
    if [[ -z $NPROC_PER_NODE ]]; then
        NPROC_PER_NODE=$(count_gpus)
        [[ $NPROC_PER_NODE != 0 ]] || NPROC_PER_NODE=$1
    fi
    require_number NPROC_PER_NODE 1 1024
    if [[ -z $OMP_NUM_THREADS ]]; then
        OMP_NUM_THREADS=$(($(nproc) / NPROC_PER_NODE))
        ((OMP_NUM_THREADS > 0)) || OMP_NUM_THREADS=1
    fi
    require_number OMP_NUM_THREADS 1 1024
    export OMP_NUM_THREADS
}

# Sets `python` to the interpreter of VENV, of .venv in the repository, or of PATH.
choose_python() {
    local repository
    repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [[ -z $VENV && -x $repository/.venv/bin/python ]]; then
        VENV=$repository/.venv
    fi
    if [[ -n $VENV ]]; then
        python=$VENV/bin/python
        [[ -x $python ]] || refuse "VENV=$VENV: has no bin/python; give the virtual environment that harness is in"
    else
        python=$(command -v python3) ||
            refuse "no python3 on PATH; set VENV to the virtual environment that harness is in"
    fi
    # Specifications only: torch itself takes seconds to import.
    local code='import sys; from importlib.util import find_spec as f; sys.exit(not (f("harness") and f("torch")))'
    "$python" -c "$code" ||
        refuse "$python: has not both harness and torch; set VENV to the virtual environment that has them"
}

# start COMMAND ...: becomes the command, or with SHOW_COMMAND=1 prints it as the shell would take it.
start() {
    if [[ $SHOW_COMMAND == 1 ]]; then
        printf 'OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
        printf ' %q' "$@"
        printf '\n'
        exit 0
    fi
    exec "$@"
}
