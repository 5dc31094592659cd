"""Drawing with a model, measuring what it drew, and telling a difference from seed noise."""
