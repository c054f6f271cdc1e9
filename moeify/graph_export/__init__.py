"""The whole converted model as one `torch.fx.GraphModule`."""
