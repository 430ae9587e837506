"""The study: its file, target, signatures and privacy cost."""
