"""What to try: Hypothesis strategies, layouts, sweeps of lengths, calls of one configuration."""
