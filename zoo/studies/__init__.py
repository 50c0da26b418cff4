"""Studies: papers re-measured, with arms, claims, verdicts, cells and one table over all papers."""
