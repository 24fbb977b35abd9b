"""A finished run as one page, and what dashboards share with it."""
