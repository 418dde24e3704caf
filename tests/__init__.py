"""What the service, its rules, dashboards and manifests promise."""
