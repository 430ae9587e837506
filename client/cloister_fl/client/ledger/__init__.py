"""Privacy ledger of a hospital: what its patients were promised, and what is used up."""
