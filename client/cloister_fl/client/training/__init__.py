"""Local training of one round with patient-level differential privacy."""
