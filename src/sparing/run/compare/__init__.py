"""Matched comparisons: arms of one recipe on the same seeds, and a verdict with its error rates."""
