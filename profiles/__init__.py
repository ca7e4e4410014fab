"""What is known: the vocabulary of models, clusters and configurations, and the measured throughput of each."""
