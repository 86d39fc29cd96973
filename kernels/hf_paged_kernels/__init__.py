"""Attention over pages and writes to them, for every device. Imports nothing of hf_paged."""
