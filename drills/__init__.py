"""Drills: a fault or a change is caused for real, and what must hold is checked and printed."""
