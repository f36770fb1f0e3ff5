"""The volley gear: hundreds of small kernel calls of one configuration, run one by one, drawn and judged together.

A kernel's faults depend on what a call is like as a whole: how many documents, how many rows, which is the longest. The
wide gear has thousands of documents in one such call, the narrow gear takes the time of a hundred to look at one from
all sides. Here the calls are small and many: their documents are one packed case, whose values are drawn, whose answers
are computed and whose results are compared in a few operations on the device, which is waited for once.
"""
