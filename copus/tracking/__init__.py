"""Other places to look at a run: TensorBoard, Weights & Biases, MLflow, Prometheus, plugins. See docs/tracking.md."""
