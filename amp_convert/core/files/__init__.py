"""Files: reading those of others, bounded; hidden folders that clean up; digests."""
