"""How vocabularies meet: tokens as bytes, text as tokens, and the units that members share."""
