"""The Megatron-core backend. Only this folder imports megatron; `backend.MegatronBackend` is its door."""
