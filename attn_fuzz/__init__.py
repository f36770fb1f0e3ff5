"""The harness: what to try, what counts as wrong, how to make it small, how to keep it."""
