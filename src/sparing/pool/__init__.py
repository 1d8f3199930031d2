"""A data set that grows: what to keep of what arrives, and how much each item adds."""
