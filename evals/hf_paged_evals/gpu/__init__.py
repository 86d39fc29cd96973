"""``hf-paged eval gpu``: what the GPU path does on the card at hand, in stages, one JSON line a finding."""
