#!/usr/bin/env bash
# Trains a recipe with one process a device. One node:   bash launch/torchrun.sh recipe.toml [--a.b=c …]
# Several nodes, the same line on each: NNODES=4 RENDEZVOUS=first-host:29500 bash launch/torchrun.sh recipe.toml
#
# NPROC             processes on this node (default: its GPUs, or 1)
# NNODES            nodes (default 1)
# RENDEZVOUS        host:port of the first node, for more than one
# SHUTDOWN_TIMEOUT  seconds that a stop request has for its checkpoint (default 600; torchrun's own default is 30)
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
nproc_default=1
if command -v nvidia-smi >/dev/null 2>&1; then
    gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
    [ "$gpus" -lt 1 ] || nproc_default="$gpus"
fi
nproc="${NPROC:-$nproc_default}"
nnodes="${NNODES:-1}"

# A hang leaves the last collectives of every rank in a file (torch's flight recorder).
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-20000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# Tensors that an asynchronous collective uses go back to the allocator as soon as it is done, not at the next sync.
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
# Fewer pieces of free memory when batches and rows change size between stages.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# What torchrun waits after a stop request before it kills.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-600}"
# A pipeline's rank has more streams (compute, FSDP's, one for each communicator) than the 8 queues that a process has by default, and
# those that share a queue wait for each other.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"
# One thread a process unless asked otherwise: processes share the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Orders all streams one behind the other, so nothing overlaps under FSDP.
if [ "$CUDA_DEVICE_MAX_CONNECTIONS" = 1 ]; then
    echo "launch/torchrun.sh: CUDA_DEVICE_MAX_CONNECTIONS=1 keeps FSDP's collectives from overlapping; unset it" >&2
    exit 2
fi

if [ "$nnodes" = 1 ]; then
    rendezvous=(--standalone)
else
    : "${RENDEZVOUS:?set RENDEZVOUS=first-host:port when NNODES is above 1}"
    # Restarts in place (--max-restarts) meet on a store of their own, not among the keys of the attempt before.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
    rendezvous=(--rdzv-backend=c10d "--rdzv-endpoint=$RENDEZVOUS" "--rdzv-id=${RUN_ID:-megacpt}")
fi
# A closed terminal ends nothing: torchrun's own default hands SIGHUP on to the ranks and ends.
trap '' HUP
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGQUIT}"
exec "${PYTHON:-python}" -m torch.distributed.run "--nnodes=$nnodes" "--nproc-per-node=$nproc" "${rendezvous[@]}" \
    -m megacpt train "$@"
