"""The published figures, of README.md and docs/: the run that measures each, and the tables made of them."""
