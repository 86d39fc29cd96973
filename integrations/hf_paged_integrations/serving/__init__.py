"""Streams of tokens, for threads and for event loops."""
