"""The transformer's layers, computed for a model that is mostly frozen."""
