"""The coordinator's service, and its run executor."""
