"""Pairs of numbers in what users declare of their code, which may come as JSON has them."""

from __future__ import annotations


def frozen(value: object) -> object:
    """Lists as tuples, and those in them."""
    return tuple(frozen(each) for each in value) if isinstance(value, list) else value


def fits_pairs(value: object) -> bool:
    """Whether something is True, False, None (not known), or pairs of numbers from 1."""
    if isinstance(value, bool) or value is None:
        return True
    return isinstance(value, tuple) and bool(value) and all(map(_is_pair, value))


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(each) is int and each >= 1 for each in value)
