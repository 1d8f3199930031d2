"""Which updates, and how large?"""
