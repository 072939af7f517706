#!/bin/bash
# A job of two machines with 8 GPUs each: sbatch config/slurm.sh. They need a common out_dir.
#
# 6 x 80 x 1,024 = 491,520 tokens per step, as in train_gpt2.py: 80 micro-batches for 16 GPUs.
# Two minutes before the time limit Slurm sends SIGTERM, and the run saves (if a save is in progress,
# after that: allow for two); how long before a preemption your cluster decides. A job that was
# preempted is queued again; after its time limit queue it again yourself. --init_from=auto resumes
# the run. --max-restarts starts the processes again when one of them dies.

#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=32 --mem=0
#SBATCH --signal=TERM@120 --requeue --time=24:00:00

# Otherwise processes that are restarted may look for each other at old addresses, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun does not take from sbatch

# Without --shutdown-timeout torchrun kills the processes 30 s after it has passed a signal on, which
# may be too soon to save a large model.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --max-restarts=3 --shutdown-timeout=300 \
    train.py config/train_gpt2.py --batch_size=6 --gradient_accumulation_steps=80 \
    --out_dir=/shared/gpt2 --init_from=auto
