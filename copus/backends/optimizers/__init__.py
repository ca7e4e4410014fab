"""How weights are updated: torch's optimizers where they do, and updates that know which tensors they work on."""
