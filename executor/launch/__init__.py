"""Where workers run: this machine, a Ray cluster, SLURM; ``supervise.launch`` is the entry."""
