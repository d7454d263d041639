"""Reading: checkpoints, adapters, and where they come from."""
