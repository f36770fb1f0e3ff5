"""Ranks under test: processes that live from case to case, and what one case has them do.

In the parent, ``gather`` runs a layer case on a ``rank_group``, whose processes ``client`` has the ``fork_server``
fork. In each of them ``rank_process`` waits for calls, and ``rank_run`` is what a case asks of it.
"""
