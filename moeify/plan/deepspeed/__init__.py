"""DeepSpeed configs as plans."""
