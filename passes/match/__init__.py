"""Read a recorded graph: MLPs, what they compute, where they can be replaced."""
