"""The command `cloister`, and the groups that need neither side."""
