"""What lies on disk or on the Hub: found, checked, recognised and read before a weight is loaded."""
