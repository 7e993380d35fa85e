#!/usr/bin/env bash
# Pre-training, or the script that is named first, on several machines by torchrun. The same command on each of them, with
# the same variables:
#
#   NODES=2 HEAD=node0 scripts/launch/torchrun.sh --config-name slam_stage1 data=paper exp_manager.exp_dir=/shared/runs
#   NODES=2 HEAD=node0 scripts/launch/torchrun.sh scripts/speech_finetune.py --config-name asr_ctc init_from=... \
#     exp_manager.exp_dir=/shared/runs
#
#   NODES  machines                       (1)
#   GPUS   processes on each of them      (all GPUs of this machine)
#   HEAD   name or address of one machine, reachable by all (localhost)
#   PORT   where they meet                (29500)
#   RUN_ID tells runs on one HEAD apart   (nemo_slam)
#
# A process that ends with an error ends all of them; started again, the run goes on from its last checkpoint. SIGTERM
# saves first: torchrun waits two minutes for that, versions without --shutdown-timeout half a minute.
set -euo pipefail
cd "$(dirname "$0")/../.."

NODES=${NODES:-1}
HEAD=${HEAD:-localhost}
PORT=${PORT:-29500}
RUN_ID=${RUN_ID:-nemo_slam}
if [ -z "${GPUS:-}" ]; then
  GPUS=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  if [ "$GPUS" -eq 0 ]; then
    echo "error: no GPU here; name the processes of this machine: GPUS=2 $0 ..." >&2
    exit 2
  fi
fi

script=scripts/speech_pretrain.py
case "${1:-}" in *.py) script=$1 && shift ;; esac

export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-120}" # torchrun reads its options from PET_* too
exec "${TORCHRUN:-torchrun}" \
  --nnodes "$NODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN_ID" \
  --max-restarts 0 \
  "$script" "$@" \
  trainer.num_nodes="$NODES" trainer.devices="$GPUS"
