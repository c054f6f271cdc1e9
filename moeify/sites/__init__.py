"""The MLPs of a model, and what stands in their place after a conversion."""
