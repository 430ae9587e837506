"""The hospital: its data, its policy, its ledger and its training."""
