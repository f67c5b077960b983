"""TurboQuant compression of transformer key/value caches."""
