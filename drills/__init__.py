"""Drills: each causes a real fault or change, checks what must hold, and prints the result."""
