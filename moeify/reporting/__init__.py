"""One HTML page about a model: its layers, plan, training and graphs."""
