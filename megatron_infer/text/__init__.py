"""Text and its ids: tokenizers, prompts of every family, text as it grows."""
