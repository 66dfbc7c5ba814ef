"""Places that are no local folder: hubs and buckets, as files that are listed, read by range and fetched."""
