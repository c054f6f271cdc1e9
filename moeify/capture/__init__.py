"""Run a model once and record it as a `torch.fx.Graph`."""
