"""tenants.yaml and packages -> frozen dataclasses; every error with file, line and column."""
