"""Toys of docs/guides: what each guide adds, small and whole, and never shipped."""
