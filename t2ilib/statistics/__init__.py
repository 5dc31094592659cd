"""What is noise and what is not: means, pooled and exact comparisons, seeds crossed with prompts, power."""
