"""How good and how fast the harness is: seeded faults, power, published tolerance rules, probes, benchmarks."""
