"""What is measured, by name: `python -m benchmarks.NAME [--quick] [--json]` prints a table, or one JSON object."""
