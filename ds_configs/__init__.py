"""DeepSpeed configurations, found by bare name."""
