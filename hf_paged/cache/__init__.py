"""Paged layers inside transformers' own `DynamicCache`."""
