"""Learning gates over the LoRAs of a diffusers pipeline."""

# The settings of the MoLE paper (section 4.1), beside ``MoLE.paper()`` and ``ClipGuidance.paper()``.
PAPER = {"learning_rate": 1e-5, "steps": 400, "batch_size": 2, "balance": 0.5}
