"""Everything that speaks to MLflow, and to what tracks runs beside it."""
