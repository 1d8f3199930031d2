"""Which parameters may differ, adapt, or exist at all: exact masks, scores, sparse adapters."""
