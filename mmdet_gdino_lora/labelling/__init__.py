"""Photos that nobody has labelled yet: what a tuned detector finds in them, as labels."""
