"""GroupMap: what is cut together (norms, residual partners, heads, the next layer), traced or declared."""

from shared.groups.families import Family, GroupMap, Member
from shared.groups.tracing import trace_groups

__all__ = ["Family", "GroupMap", "Member", "trace_groups"]
