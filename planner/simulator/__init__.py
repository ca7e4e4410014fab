"""Runs of a job that take microseconds: a throughput table, a law for φ, and the policies of the trainer."""
