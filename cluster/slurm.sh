#!/bin/bash
# Two nodes, one rank on each: sbatch cluster/slurm.sh --data /shared/corpus --out /shared/run
# Given again it goes on from the last checkpoint. Change what stands behind #SBATCH to your cluster.
#SBATCH --job-name=rosetrainer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
# With GPUs, as many ranks a node: --ntasks-per-node=8 --gpus-per-task=1

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500 OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# At its end or at scancel a job gets SIGTERM, and SIGKILL KillWait seconds later, 30 by default:
# `scontrol show config | grep KillWait`. The step under way and a save have to fit in.
exec srun .venv/bin/python -m rosetrainer train --tp-size 2 --grace 30 "$@"
