#!/bin/bash
# Ray inside a Slurm job: a head on the first node, a worker on every other one, and one command over all of them.
# Submit with `sbatch ray.sh`. When a node is lost its shards are done again; when the job is, submit it again: it resumes.
#SBATCH --job-name=k2quant-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=16G
#SBATCH --exclusive
#SBATCH --time=04:00:00
set -euo pipefail

source=${SOURCE:-/shared/Kimi-K2-Instruct}
destination=${DESTINATION:-/shared/Kimi-K2-Instruct-INT4}
cores=${SLURM_CPUS_PER_TASK:?run it with sbatch}
port=${RAY_PORT:-6379}

mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?run it with sbatch}")
head=${nodes[0]}
export RAY_ADDRESS="$head:$port"  # what `--cluster auto` takes

# Ray's own start needs no address at the head.
srun --nodes=1 --ntasks=1 --overlap --nodelist="$head" \
    env -u RAY_ADDRESS ray start --head --port="$port" --num-cpus="$cores" --disable-usage-stats --block &
sleep "${RAY_PAUSE:-20}"
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap --nodelist="$node" \
        env -u RAY_ADDRESS ray start --address="$head:$port" --num-cpus="$cores" --disable-usage-stats --block &
done

# Nodes that are not there yet join as they come. The job, and with it Ray, ends when this does.
status=0
k2quant convert --to int4 --cluster auto "$source" "$destination" || status=$?
exit "$status"
