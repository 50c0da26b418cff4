"""GroupMap: what is cut together (norms, residual partners, heads, the next layer), traced or declared."""

from .families import Family, GroupMap, Member, Role
from .tracing import trace_groups

__all__ = ["Family", "GroupMap", "Member", "Role", "trace_groups"]
