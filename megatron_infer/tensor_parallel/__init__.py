"""Tensor parallelism: how ranks meet, the group they form, and the ways they talk."""
