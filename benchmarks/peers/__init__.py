"""Parts of cpu_vs_peers.py: what is measured, the model's files, the engines behind one interface, and the report."""
