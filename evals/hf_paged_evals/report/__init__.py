"""The report of a run, made of its results alone: Markdown, and one HTML page that needs nothing else."""
