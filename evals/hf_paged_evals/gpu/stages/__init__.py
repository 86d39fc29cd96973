"""The stages of ``hf-paged eval gpu``: each module has a function ``run(context)``."""
