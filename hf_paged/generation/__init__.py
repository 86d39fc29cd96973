"""Calls of `generate` that run together: the engine, its calls, and the cache that a call leaves."""
