"""Tasks that compare answers: dense against paged."""
