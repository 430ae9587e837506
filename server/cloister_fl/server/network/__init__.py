"""Ports of the server: TLS, limits, who may ask for what."""
