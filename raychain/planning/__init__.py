"""What a chain costs: MACs of models and stages."""
