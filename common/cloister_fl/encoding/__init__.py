"""Canonical bytes: frames, JSON, and chains of hashes over them."""
