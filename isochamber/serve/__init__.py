"""The resident supervisor: a nursery that forks and keeps the tenants, a supervisor that decides, clients."""
