"""The study: its file, its target, its signatures, and what it costs."""
