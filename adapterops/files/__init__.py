"""Files: strict headers, positioned reads, staged writes, guarded pickles. No algebra."""
