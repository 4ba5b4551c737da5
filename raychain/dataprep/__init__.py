"""Before a run: shards checked whole, and packed from tables of pictures and captions. No Ray or torch."""
