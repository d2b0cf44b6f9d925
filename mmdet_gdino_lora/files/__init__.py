"""Files that came from somewhere: fetched whole, and read without running what they may hold."""
