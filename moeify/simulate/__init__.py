"""Memory and traffic of a training step in a world that is not there."""
