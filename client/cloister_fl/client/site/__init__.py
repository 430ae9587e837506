"""The site folder: settings, policy, keys, audit log, trusted roster."""
