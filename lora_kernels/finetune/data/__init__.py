"""Data for the tasks: files of the user, a cached corpus, and synthetic sentences."""
