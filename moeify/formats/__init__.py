"""Folders that other libraries read."""
