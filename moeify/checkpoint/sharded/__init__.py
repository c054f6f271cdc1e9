"""Checkpoints of many ranks, on `torch.distributed.checkpoint`."""
