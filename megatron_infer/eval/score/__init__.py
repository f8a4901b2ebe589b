"""`eval score`: judge completions; metrics, intervals and test programs."""
