"""A first experiment file: what shards hold, what would suit them, and the file that says so."""
