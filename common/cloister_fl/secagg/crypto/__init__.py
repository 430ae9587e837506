"""Primitives of secure aggregation: key agreement, keystreams, secret sharing, hashes."""
