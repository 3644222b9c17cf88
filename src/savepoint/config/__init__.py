"""A run's configuration: read once as plain data, checked before the slow imports, then typed."""
