"""The words of the service as frozen values. Knows the standard library alone; nothing here does any work."""
