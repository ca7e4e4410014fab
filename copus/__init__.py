"""What runs on every rank: training loop, noise measurement, backends, moves and checkpoints.

Importing this package imports no torch: `copus.job` and `copus.events` are read by the launcher too.
"""
