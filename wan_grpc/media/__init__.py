"""Pixels in, files out. Knows formats and containers; does not know where frames come from or where bytes go."""
