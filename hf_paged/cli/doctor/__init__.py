"""``hf-paged doctor``."""
