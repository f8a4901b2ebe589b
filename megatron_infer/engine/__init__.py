"""The engine: rank 0 plans a step in integers, every rank executes it, rank 0 samples and commits."""
