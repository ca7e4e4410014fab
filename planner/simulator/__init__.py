"""Runs of a job that take microseconds: a throughput table, a law for the critical batch, and the policies of the trainer."""
