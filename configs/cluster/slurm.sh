#!/bin/bash
#SBATCH --requeue --open-mode=append          # a preempted job is started again, and goes on with its run
#SBATCH --time=4:00:00 --signal=TERM@120      # two minutes before the limit: save, leave with 143
#SBATCH --nodes=1 --ntasks-per-node=1         # a task is a rank
#
#   sbatch configs/cluster/slurm.sh --config configs/mnist.yaml
#   sbatch --nodes=2 --ntasks-per-node=8 configs/cluster/slurm.sh --config configs/mnist.yaml --trainer.strategy ddp
#
# From the directory of the project, which all nodes share. All words go to train.py.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # if srun starts torchrun: its restarts then come up
srun python train.py --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" "$@"; code=$?
[ $code -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"   # after a time limit SLURM does not do it by itself
exit $code
