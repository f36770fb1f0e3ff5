"""Findings as Python files of their own, to paste into a report: torch and the backend, nothing of this project."""
