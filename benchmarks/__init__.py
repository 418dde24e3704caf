"""How fast the service is, and how much it can do."""
