"""Tasks that measure speed and memory."""
