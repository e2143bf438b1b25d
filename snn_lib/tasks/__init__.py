"""What a batch becomes: loss, metrics, and what ``--test`` reports."""
