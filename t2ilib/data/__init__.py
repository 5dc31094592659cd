"""Captioned pictures: where they come from, what is in them, and how they reach the loop."""
