"""Measurements of accuracy, speed and memory, dense and paged."""
