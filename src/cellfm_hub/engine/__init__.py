"""Plan batches, choose device and precision, run networks."""
