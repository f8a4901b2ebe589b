"""`eval run`: complete every case of a benchmark on any number of ranks, however often it is interrupted."""
