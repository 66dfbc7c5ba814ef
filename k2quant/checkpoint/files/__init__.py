"""Files of people we do not know: paths that stay inside, JSON and YAML that hold no surprises, checksums."""
