"""Which layers of a model get adapters, how they are exchanged, and a report of what runs."""
