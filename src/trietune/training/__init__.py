"""The training loop, the order of the data and the optimizer."""
