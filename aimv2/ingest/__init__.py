"""From pairs as they are found to shards that are ready for training: writing, joining, measuring, filtering."""
