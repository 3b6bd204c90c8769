"""The norm tree for people: terminal text, HTML."""
from __future__ import annotations
def text(norm): 
    return "\n".join(f"{l.key:55} {l.atom.describe():28} m={l.mass:.4f} S={l.sensitivity:.4f} s={l.scale:.3f} t={l.target:.4f} {l.status}" for l in norm.leaves)
