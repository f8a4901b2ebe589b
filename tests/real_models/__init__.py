"""Checks on real weights, too slow for `make test`: python -m tests.real_models CHECKPOINT."""
