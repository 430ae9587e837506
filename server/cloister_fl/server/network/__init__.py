"""Ports of the server: TLS, limits, access checks."""
