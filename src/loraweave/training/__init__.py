"""Learning gates over frozen experts."""
