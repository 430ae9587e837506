"""`cloister client` and `cloister predict`: what a hospital's own people type."""
