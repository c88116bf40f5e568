"""How one device's code becomes many. Knows ranks and collectives; no pipeline, no queue."""
