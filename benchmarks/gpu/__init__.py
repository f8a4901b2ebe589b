"""What gpu_suite.py is made of."""
