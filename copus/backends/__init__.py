"""Training frameworks behind one interface: `base.Backend` is the interface, each folder one framework."""
