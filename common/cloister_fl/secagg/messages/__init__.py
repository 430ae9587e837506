"""Messages of secure aggregation, and the only way from bytes to them and back."""
