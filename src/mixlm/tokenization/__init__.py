"""Text, token ids and bytes: vocabularies, canonical tokens of growing text, chat templates."""
