"""Builders and views of graph nodes that several passes share."""
