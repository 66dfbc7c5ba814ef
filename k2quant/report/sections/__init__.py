"""Sections of the page with a subject of their own: an update that was merged in, scales that were searched, checks."""
