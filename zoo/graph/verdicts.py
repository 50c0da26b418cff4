from __future__ import annotations
def summarise(*a): return None
