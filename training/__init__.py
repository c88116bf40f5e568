"""How the small Wan2.2 models of this project are made: their world, its clips, the judge of what they generate."""
