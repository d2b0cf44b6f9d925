"""What only CPUs run: the same results as the plain definitions, faster there."""
