"""The coordinator's service, and the process that executes runs."""
