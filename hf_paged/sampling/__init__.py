"""From logits to tokens: processors, random numbers, stopping criteria, streamers of rows."""
