# shellcheck shell=bash
# What train.sbatch and requeue.sbatch share. They source it below their block of variables, which it reads. It lies in
# the repository: SLURM runs a copy of a batch script, from its own folder.

source "$HARNESS_ROOT/launch/common.sh"

resolves() {
    [[ -n $1 ]] && getent ahosts "$1" >/dev/null
}

# prepare_job ARGUMENT ...: what torchrun.sh is to know of the allocation, exported; refuses what cannot start.
prepare_job() {
    local usage="sbatch launch/$SCRIPT_NAME CONFIG [section.key=value ...]" nodes first
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse "not in a SLURM job; submit it: $usage"
    [[ $# -gt 0 ]] || refuse "no configuration; usage: $usage"

    # Machine 0 is the allocation's first, by its name, or by the address SLURM has for it where that does not resolve.
    nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}") || nodes=
    first=${nodes%%$'\n'*}
    [[ -n $first ]] || refuse "no MASTER_ADDR: scontrol shows no machine in the allocation" \
        "(SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST:-})"
    MASTER_ADDR=$first
    if ! resolves "$MASTER_ADDR"; then
        MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || MASTER_ADDR=
    fi
    resolves "$MASTER_ADDR" || refuse "no MASTER_ADDR: the name $first does not resolve on this machine," \
        "and scontrol has no other address for it"

    # 10000 to 29999, below the ports that Linux hands out by itself (32768 and up); jobs on one machine differ.
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    NNODES=$SLURM_JOB_NUM_NODES
    RDZV_ID=$SLURM_JOB_ID
    unset NODE_RANK RDZV_ENDPOINT RDZV_IS_HOST RDZV_LOCAL_ADDR # of the shell that called sbatch
    export VERB MASTER_ADDR MASTER_PORT NNODES RDZV_ID NPROC_PER_NODE VENV OMP_NUM_THREADS JOIN_TIMEOUT_SECONDS
    # srun does not take this from sbatch since SLURM 22.05, and would give each task a single core.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    fi
    echo "job $SLURM_JOB_ID: $NNODES machines (${nodes//$'\n'/ }), rendezvous at $MASTER_ADDR:$MASTER_PORT"
}

# start_tasks SRUN_OPTION ... -- ARGUMENT ...: one task a machine, torchrun inside it; srun's exit status.
start_tasks() {
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    # With SIGTERM to the ranks, which save, SLURM sends one to this shell, and the job has ended when the shell has.
    trap : TERM
    # USR1: see launch/common.sh; here it is for this one shell, until that is read.
    # shellcheck disable=SC2016 # SLURM_NODEID is each task's own
    srun "${options[@]}" --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 \
        bash -c 'trap "" USR1; NODE_RANK=$SLURM_NODEID exec bash "$0" "$@"' "$HARNESS_ROOT/launch/torchrun.sh" "$@"
}
