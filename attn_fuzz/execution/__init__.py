"""Running a case on a backend: runs, what is observed, poison in unwritten memory, processes, inferred capabilities."""
