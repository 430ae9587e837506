"""What is known of files from before: their index, and their pixels, sealed."""
