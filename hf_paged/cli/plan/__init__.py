"""``hf-paged plan``."""
