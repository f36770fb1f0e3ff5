"""Smaller and still failing: cases, sequences of calls, packed calls."""
