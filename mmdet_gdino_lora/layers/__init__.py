"""These layers compute what mmdet's compute, for a model that is mostly frozen."""
