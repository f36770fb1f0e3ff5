"""The wide gear: one packed call is thousands of experiments, with one verdict per document and tensor."""
