"""From one case to others: smaller layouts, simpler options, repairs, subsets, interfering calls."""
