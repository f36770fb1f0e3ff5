"""Relations between two runs: what the other one is made of, and what its results have in common with the first.

A relation makes the tensors of a run and compares what comes out, on any device and for any number of documents,
without waiting for the device. Single cases ask it on the CPU and tell the first difference in a sentence
(``oracle/checks``); batches ask it of all their calls at once, with a verdict per document (``batch/questions.py``).
"""
