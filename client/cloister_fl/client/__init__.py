"""Client side, at the hospital: data, policy, privacy ledger and training."""
