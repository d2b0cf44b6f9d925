"""Only CPUs run this; it gives the results of the plain definitions, and is faster there."""
