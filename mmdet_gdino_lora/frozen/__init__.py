"""Frozen features: what the frozen part of the model makes of an image's views, kept on disk."""
