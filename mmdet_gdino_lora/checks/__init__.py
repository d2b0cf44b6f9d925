"""What can be known of a run before it starts: its data, its names, its settings."""
