"""Save and load converted models."""
