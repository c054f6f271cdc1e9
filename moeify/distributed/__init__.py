"""Meshes, layouts, collectives as graph nodes, agreement of ranks, gradient reduction."""
