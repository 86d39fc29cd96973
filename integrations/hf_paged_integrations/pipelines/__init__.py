"""Text-generation pipelines whose items run together."""
