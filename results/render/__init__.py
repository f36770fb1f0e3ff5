"""Writes the committed tables and pictures from results/*.json; run from a checkout, not installed."""
