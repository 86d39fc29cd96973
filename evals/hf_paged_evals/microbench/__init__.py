"""Measurements of one part each: an attention call, a decode step, the scheduler, a pipeline."""
