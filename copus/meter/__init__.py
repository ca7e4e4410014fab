"""The noise scale in a training loop that is not ours: `copus.NoiseMeter`, its callbacks, and a controller of the
batch."""
