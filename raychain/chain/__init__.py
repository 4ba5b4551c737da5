"""The chain: what its stages are and cost, their content addresses and artifacts, and the driver that runs them on Ray."""
