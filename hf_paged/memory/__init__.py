"""KV blocks: which are free, cached or used, where their keys and values lie, and how many there may be."""
