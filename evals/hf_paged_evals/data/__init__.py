"""Prompts and texts of a run: the user's dataset, or offline ones out of installed packages."""
