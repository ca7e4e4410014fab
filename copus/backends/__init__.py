"""Training frameworks behind one interface, `base.Backend`. Every folder is a framework."""
