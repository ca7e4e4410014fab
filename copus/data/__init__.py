"""Text into tokens: `prepared` says where a job's data is and whether it can be made, `prepare` makes it."""
