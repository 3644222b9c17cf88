#!/bin/bash
# One run on several hosts, which share the directory of the project. On each host the same line: it starts the run, or goes on
# with it; after a failure of any rank all of them begin again at the last checkpoint.
#
#   HOSTS=2 RANKS=8 FIRST=node-a:29400 configs/cluster/torchrun.sh NAME --config configs/mnist.yaml --trainer.strategy ddp
#
#   HOSTS     how many there are
#   RANKS     processes on each
#   FIRST     one of them, and a free port there
#   RESTARTS  how often, at most, all ranks begin again: 3
#   ADDRESS   of this host, where the others do not reach it by its name
#   NAME      of the run; other words go to train.py
set -eu
name=${1:?the name of the run is missing}; shift
cd "$(dirname "$0")/../.."
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # or new ranks may look for the dead ones
exec python -m torch.distributed.run --nnodes "${HOSTS:?}" --nproc-per-node "${RANKS:?}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${FIRST:?}" --rdzv-id "$name" ${ADDRESS:+--local-addr "$ADDRESS"} \
    train.py --run_name "$name" --resume auto --trainer.num_nodes "$HOSTS" --trainer.devices "$RANKS" "$@"
