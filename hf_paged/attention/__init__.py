"""The attention function and the mask function of "paged" models."""
