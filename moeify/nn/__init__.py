"""The modules of a MoE block, usable by hand."""
