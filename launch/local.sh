#!/usr/bin/env bash
# Trains with several processes on this machine:
#     launch/local.sh CONFIG [section.key=value ...]
set -euo pipefail

# ---- Variables: set them in the environment, or change the defaults here ----
: "${VERB:=train}"       # train, or remove-norms
: "${NPROC_PER_NODE:=}"  # processes; empty: one a GPU, or 2 where there is none
: "${VENV:=}"            # virtual environment; empty: .venv in the repository if there, else PATH decides
: "${OMP_NUM_THREADS:=}" # CPU threads of a process; empty: the cores, shared out
: "${SHOW_COMMAND:=0}"   # 1: print the command and start nothing
# Passed on as they are: CUDA_VISIBLE_DEVICES, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ $# -gt 0 ]] || refuse "no configuration; usage: launch/local.sh CONFIG [section.key=value ...]"
require_verb
choose_processes 2
choose_python

# Ranks keep this terminal for their output; the status is not 0 if any of them fails, and the others are ended.
start "$python" -m harness.launcher --standalone --nproc-per-node="$NPROC_PER_NODE" --max-restarts=0 \
    -m harness "$VERB" "$@"
