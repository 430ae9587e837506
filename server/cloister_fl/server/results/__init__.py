"""What a run gave: progress, report, model file, audit report."""
