"""Before against after on held-out prompts: comparison, interval, report."""
