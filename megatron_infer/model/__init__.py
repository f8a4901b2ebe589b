"""The network, its rotary tables, its weight formats, and the checkpoints it is loaded from."""
