"""Which experts act on this token, and how many exist?"""
