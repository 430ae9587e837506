"""Protocol of a run above Flower: messages and secure-aggregation sessions."""
