"""What a training run came to, as one page that a person looks at."""
