"""Filling the throughput table: what drives a profiler, and the profilers that need torch."""
