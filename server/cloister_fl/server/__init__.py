"""Server side, at the coordinator: network, runs and their rounds, results."""
