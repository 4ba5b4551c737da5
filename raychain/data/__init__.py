"""From tar shards to batches: addresses and counts, the order of samples, the decoded cache, the loader. No Ray."""
