"""The search for a better chain: space, samplers, the tree of stages that trials share, and what runs them."""
