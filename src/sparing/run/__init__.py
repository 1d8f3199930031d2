"""Runs of recipes: their directories, records and pages."""
