"""The hospital's privacy ledger: what its patients were promised, and what is used up."""
