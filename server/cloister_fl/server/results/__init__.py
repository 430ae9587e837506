"""Results of a run: progress, report, model file, audit report."""
