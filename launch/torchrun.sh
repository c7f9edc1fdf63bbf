#!/usr/bin/env bash
# Trains on several machines: the same command on each of them, at about the same time.
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh CONFIG [section.key=value ...]
#     NNODES=2 RDZV_ENDPOINT=host0:29500 RDZV_ID=run7 launch/torchrun.sh CONFIG [section.key=value ...]
# The first form is static: each machine is told its number, here NODE_RANK=1 on the second machine. In the second
# form (c10d) they number themselves.
set -euo pipefail

# ---- Variables: set them in the environment, or change the defaults here ----
: "${VERB:=train}"               # train, or remove-norms; the same on each machine
: "${NNODES:=}"                  # number of machines
: "${NPROC_PER_NODE:=}"          # processes on each machine; empty: one a GPU, or 1 where there is none
: "${MASTER_ADDR:=}"             # static: name or address of machine 0, as the others reach it
: "${MASTER_PORT:=}"             # static: a free port of machine 0; empty: 29500
: "${NODE_RANK:=}"               # static: number of this machine, 0 to NNODES - 1
: "${RDZV_ENDPOINT:=}"           # c10d: HOST:PORT of one of the machines, the same on all
: "${RDZV_ID:=}"                 # c10d: name of this start, the same on all machines, another for every run
: "${RDZV_IS_HOST:=}"            # c10d: true on the machine of RDZV_ENDPOINT, false on the others; empty: by its name
: "${RDZV_LOCAL_ADDR:=}"         # c10d: address of this machine, as the others reach it; empty: its host name
: "${JOIN_TIMEOUT_SECONDS:=600}" # how long to wait for the other machines (c10d: 60 for that of the endpoint)
: "${VENV:=}"                    # virtual environment; empty: .venv in the repository if there, else PATH decides
: "${OMP_NUM_THREADS:=}"         # CPU threads of a process; empty: the cores, shared out
: "${SHOW_COMMAND:=0}"           # 1: print the command and start nothing
# Passed on as they are: CUDA_VISIBLE_DEVICES, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_address() { # require_address NAME HOST
    getent ahosts "$2" >/dev/null ||
        refuse "$1: the name $2 does not resolve on this machine; give an address, or mend /etc/hosts"
}

[[ $# -gt 0 ]] || refuse "no configuration; usage: launch/torchrun.sh CONFIG [section.key=value ...]"
[[ -n $NNODES ]] || refuse "NNODES is not set; it is the number of machines, the same on each"
require_number NNODES 1 65536
require_verb
require_number JOIN_TIMEOUT_SECONDS 1 86400

if [[ -n $RDZV_ENDPOINT ]]; then
    for name in MASTER_ADDR MASTER_PORT NODE_RANK; do
        [[ -z ${!name} ]] || refuse "$name (static) and RDZV_ENDPOINT (c10d) are both set; unset one of them"
    done
    [[ $RDZV_ENDPOINT =~ ^([^:]+):([0-9]+)$ ]] ||
        refuse "RDZV_ENDPOINT=$RDZV_ENDPOINT: should be HOST:PORT, such as host0:29500"
    require_address RDZV_ENDPOINT "${BASH_REMATCH[1]}"
    [[ -n $RDZV_ID ]] || refuse "RDZV_ID is not set; it is a name for this start, the same on each machine"
    conf=join_timeout=$JOIN_TIMEOUT_SECONDS
    case $RDZV_IS_HOST in
        "") ;;
        true | false) conf+=,is_host=$RDZV_IS_HOST ;;
        *) refuse "RDZV_IS_HOST=$RDZV_IS_HOST: should be true on the machine of RDZV_ENDPOINT, false on the others" ;;
    esac
    rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="$RDZV_ID" --rdzv-conf="$conf")
    if [[ -n $RDZV_LOCAL_ADDR ]]; then
        rendezvous+=(--local-addr="$RDZV_LOCAL_ADDR")
    fi
elif [[ -n $MASTER_ADDR ]]; then
    for name in RDZV_IS_HOST RDZV_LOCAL_ADDR; do
        [[ -z ${!name} ]] || refuse "$name (c10d) and MASTER_ADDR (static) are both set; unset one of them"
    done
    [[ -n $NODE_RANK ]] || refuse "NODE_RANK is not set; it is the number of this machine, 0 to $((NNODES - 1))"
    require_number NODE_RANK 0 $((NNODES - 1))
    : "${MASTER_PORT:=29500}"
    require_number MASTER_PORT 1 65535
    require_address MASTER_ADDR "$MASTER_ADDR"
    rendezvous=(--node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"
        --rdzv-id="${RDZV_ID:-harness}" --rdzv-conf="timeout=$JOIN_TIMEOUT_SECONDS")
else
    refuse "neither MASTER_ADDR (static rendezvous) nor RDZV_ENDPOINT (c10d) is set; see launch/README.md"
fi
choose_processes 1
choose_python

# Ranks keep this terminal for their output; the status is not 0 if any rank of this machine fails.
start "$python" -m harness.launcher --nnodes="$NNODES" --nproc-per-node="$NPROC_PER_NODE" "${rendezvous[@]}" \
    --max-restarts=0 -m harness "$VERB" "$@"
