"""What a data steward reads and signs: reviews, budgets, reports, certificates."""
