"""Planning of a study: its cost, and how much it can learn, before training."""
