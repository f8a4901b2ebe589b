"""The benchmarks that are known: their fields, prompts, settings, post-processing and output rows."""
