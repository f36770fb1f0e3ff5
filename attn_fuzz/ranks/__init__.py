"""Ranks under test: processes that live from case to case, and what one case has them do.

``host`` forks them, ``member`` is what runs in each, ``team`` is those that work together, as the parent sees them, and
``slices`` runs a layer case on a team.
"""
