"""Texts and conversations as people have them, as rows of tokens, each marked whether it is learnt."""
