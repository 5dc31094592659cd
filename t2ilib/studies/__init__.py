"""Studies: study file -> variants x seeds -> papermill -> results. Starts kernels and reads files; imports no torch."""
