"""What counts as wrong: symptoms, checks, known-answer inputs, and the verdict on one case."""
