#!/bin/bash
# A training over two machines of eight cards under Slurm:  sbatch examples/cluster/slurm.sh sst2.yaml
#
# Two minutes before its time is over the job gets SIGTERM, saves after the step under way, and ends. Submitted again, it
# goes on from there; a job that Slurm requeues does so by itself. `project_dir` must lie on a disk that all machines see.
#SBATCH --job-name=trietune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=${1:?name a YAML file: sbatch examples/cluster/slurm.sh sst2.yaml}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head:29500" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    -m trietune train "$config" --resume
