"""Adapters: what is attached where, proof that it trains, and files that other programs load."""
