"""The chain: what its stages are and cost, their content addresses, and the driver that runs them on Ray."""
