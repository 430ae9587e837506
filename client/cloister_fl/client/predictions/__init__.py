"""What a prediction writes: the table of scores, the segmentation masks, and where they may go."""
