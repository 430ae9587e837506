"""Which images are one patient's: units of privacy, the steward's mapping, possible matches."""
