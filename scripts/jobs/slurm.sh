#!/bin/bash
# A Slurm job of milora-init. Its arguments are those of the command; see docs/scale.md.
#SBATCH --job-name=milora-init
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-}"  # so many weights are solved at a time
[ -n "$OMP_NUM_THREADS" ] || unset OMP_NUM_THREADS
exec milora-init "$@"
