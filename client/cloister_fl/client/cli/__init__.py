"""Command line of the client: `cloister client` and `cloister predict`."""
