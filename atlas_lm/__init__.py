"""Memory-augmented language models that train so that no failure stays silent."""
