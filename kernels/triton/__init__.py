"""The ops in Triton for GPUs."""
