"""spec -> doit task dicts, nothing else."""
