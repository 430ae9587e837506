"""Checks before a run: machine, network, data; numbered findings with remedies."""
