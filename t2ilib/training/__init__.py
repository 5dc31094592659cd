"""Objectives, optimizers, validation, checkpoints, and the one loop that uses them."""
