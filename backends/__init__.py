"""The systems under test: kernels, the buffered layer around them, and the faults planted in them.

This floor imports ``reference`` for its words (cases, layouts, profiles) and never for answers.
"""
