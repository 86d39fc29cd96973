"""One step on the model: its inputs, its cache, its forward."""
