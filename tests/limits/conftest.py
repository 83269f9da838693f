"""The launcher's tenants, with limits."""

from tests.launch.conftest import base, launch_root, make_tenant, tenant

__all__ = ["base", "launch_root", "make_tenant", "tenant"]
