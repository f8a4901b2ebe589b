"""Tensor parallelism: the group of ranks, and the layers that are split over it."""
