"""Folders of transformers' own MoE classes: Mixtral, Qwen, OLMoE, GLM."""
