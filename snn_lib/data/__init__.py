"""What becomes a batch: reading data sets, augmenting and damaging samples, sharing them out."""
