"""Near duplicates: who is near whom, and who stands for whom."""
