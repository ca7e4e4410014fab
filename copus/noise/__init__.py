"""Measuring the gradient noise scale. The gradients' norms come from a backend; everything here is arithmetic on
them."""
