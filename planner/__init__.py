"""What decides: statistical efficiency, goodput, the space of configurations and the switching rule."""
