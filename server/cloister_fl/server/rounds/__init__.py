"""The run: participants, rounds, collection, strategies, checkpoints."""
