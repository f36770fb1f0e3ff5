"""Planted faults: small, named deviations of a correct implementation, each standing for published bugs.

One family a file. A fault is a small class: a ``KernelFault`` changes one decision of the loop (backends/loop.py), a
``LayerFault`` one of the buffered layer. Its docstring says what is wrong, ``reports`` who was bitten; the ids follow
the classes of bugs that are known from public reports. ``fault:ID`` is a backend like any other.
"""
