"""The command ``hf-paged``."""
