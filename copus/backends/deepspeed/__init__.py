"""The DeepSpeed backend: ZeRO 0 to 3 of transformers' models, the only folder that imports deepspeed."""
