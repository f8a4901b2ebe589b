"""Batch evaluation: `run` completes a benchmark's cases, `score` and `report` judge them, `build` makes new cases."""
