"""torch's FSDP2 on transformers' models. `backend.FsdpBackend` is its door; what it runs is said in `description`."""
