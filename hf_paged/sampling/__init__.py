"""From logits to tokens: the table of processors, samplers, random numbers, stopping criteria, streamers of rows."""
