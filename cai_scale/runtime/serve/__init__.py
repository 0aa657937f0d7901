"""`cai-scale serve`: a bundle behind the OpenAI protocol, a scorer, and a page. No torch."""
