"""Other projects' layouts and weights, in and out."""
