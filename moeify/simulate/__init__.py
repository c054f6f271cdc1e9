"""Memory and traffic of a training step in a simulated world."""
