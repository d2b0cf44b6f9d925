"""Where adapters go, what is trained beside them, and whether it learns."""
