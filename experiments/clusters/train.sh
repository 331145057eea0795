#!/usr/bin/env bash
# Many nodes without a scheduler: run the same line on every node, with its own NODE_RANK.
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 experiments/clusters/train.sh llama3_8b --mesh.dp 8
set -euo pipefail
: "${NODES:?number of nodes}" "${NODE_RANK:?number of this node, from 0}" "${HEAD:?address of node 0}"

LAUNCH=(torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${GPUS_PER_NODE:-8}"
        --master-addr "$HEAD" --master-port "${PORT:-29500}")

[ "${DOCTOR:-1}" = 0 ] || "${LAUNCH[@]}" -m fmegatron doctor
exec "${LAUNCH[@]}" -m fmegatron train "$@"
