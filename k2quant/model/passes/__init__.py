"""Texts through a model, a layer at a time: what is fed, what is kept, and how two models differ."""
