"""The one training loop: state, optimiser, checkpoints, and the Ray Train worker that runs consecutive stages."""
