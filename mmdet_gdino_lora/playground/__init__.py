"""A page to try a tuned detector on: a photo, names, and how strong the adapter is."""
