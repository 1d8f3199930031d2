"""Hosts bind the methods' seams to a training loop, and own nothing else."""
