"""What is compared by pairs where there are some, and by rank elsewhere."""
