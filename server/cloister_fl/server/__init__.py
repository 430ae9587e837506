"""The coordinating site: rounds, optimisers, checkpoints, reports and the simulation."""
