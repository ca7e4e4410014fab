"""Policies: what runs from now on. `policy.py` has their protocol, and makes the one that a job file names."""
