"""Data for the tasks: files of a user, and corpora that need no download."""
