"""Arguments of other training tools: read into job files (`copus import-args`), written from plans (`--emit`)."""
