"""Inputs whose right results are known exactly, and how far from them correct arithmetic may be."""
