"""What a study will cost and how much it can learn, before anybody trains."""
