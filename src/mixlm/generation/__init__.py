"""Writing sequences: members, requests to engines, one generation or many at once."""
