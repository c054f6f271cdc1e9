"""The MLPs of a model, and what replaces them in a conversion."""
