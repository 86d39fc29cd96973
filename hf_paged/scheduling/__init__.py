"""Rows that wait and rows that run: which tokens the next step runs, and which blocks hold them already."""
