"""What a round is: plans, reports, aggregation, virtual paths, GradIP, early stopping; no torch."""
