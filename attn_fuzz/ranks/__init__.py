"""Ranks under test: processes that live from case to case, and what one case has them do.

In the parent, ``whole`` runs a layer case on a ``team`` of ranks, whose processes ``host`` has the ``nursery`` fork. In
each of them ``member`` waits for calls, and ``slices`` is what a case asks of it.
"""
