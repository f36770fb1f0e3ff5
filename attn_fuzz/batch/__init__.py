"""Thousands of verdicts on the device: one packed case, run as one call or cut into many, judged together."""
