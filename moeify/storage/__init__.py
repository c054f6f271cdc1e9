"""Bytes on disk: folders, JSON, safetensors. Knows no model."""
