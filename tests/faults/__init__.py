"""Faults that are put into real training processes, and long runs; `make test-faults`."""
