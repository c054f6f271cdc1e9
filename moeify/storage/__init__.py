"""Bytes on disk: folders, JSON, safetensors, and the tensors of a model in them."""
