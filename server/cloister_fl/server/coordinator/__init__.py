"""The coordinator's folder: keys, sites, invites, runs, who was rejected."""
