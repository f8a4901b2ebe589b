"""Who implements each op on a device: chosen once at load, and proven first where it is not torch itself."""
