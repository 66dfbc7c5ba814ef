#!/bin/bash
# A Slurm job array without Ray: each task writes its share of the shards, the last to finish completes the folder.
# Submit with `sbatch array.sh`; a task that was killed is submitted again by its number, `sbatch --array=3 array.sh`,
# with PARTS=8 in its environment, for the shares are those of eight parts whoever runs.
#SBATCH --job-name=k2quant-parts
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

# A folder that all nodes see, or an address: hf://moonshotai/Kimi-K2-Instruct, s3://bucket/folder.
source=${SOURCE:-/shared/Kimi-K2-Instruct}
destination=${DESTINATION:-/shared/Kimi-K2-Instruct-INT4}
parts=${PARTS:-${SLURM_ARRAY_TASK_COUNT:?run it with sbatch}}

exec k2quant convert --to int4 --part "${SLURM_ARRAY_TASK_ID:?run it with sbatch}/$parts" \
    --workers "${SLURM_CPUS_PER_TASK:-1}" "$source" "$destination"
