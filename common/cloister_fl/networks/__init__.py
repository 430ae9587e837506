"""Networks that a study may name, and what makes one fit for differential privacy."""
