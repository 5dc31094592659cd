"""Base models: loading, what the families do differently, quantizing, and the tiny models that ship."""
