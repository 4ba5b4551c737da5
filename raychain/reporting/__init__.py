"""What a run tells: events from the workers, the run folder's records, live progress, the closing table."""
