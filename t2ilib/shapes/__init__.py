"""The drawn world: what it shows, how it is read back, and the tiny models that are trained on it."""
