"""Models of a run: one model with different attention, and tiny random ones of every type."""
