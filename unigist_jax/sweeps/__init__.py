"""Sweeps: many runs of one config, each with overrides of its own, on this machine or on a Slurm cluster."""
