"""The coordinator's folder: keys, sites, invites, runs, rejected requests."""
