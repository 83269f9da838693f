"""One containers.json entry in, one container out. Imports the standard library only."""
